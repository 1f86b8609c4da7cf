"""The command line that containerd gives a shim, in the syntax of Go's ``flag`` package."""

from __future__ import annotations

from shim.record import Record
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.host.daemonize import MakeShim


class Invocation(Record):
    """One run of the program, in its own process or in a zygote's fork."""

    #: The command line without the program.
    arguments: list[str]
    #: The standard input, if it has been read.
    sent: bytes | None = None
    #: Makes a shim in a zygote's fork; otherwise ``start`` runs the program again for it.
    make_shim: MakeShim | None = None
    #: When the process that containerd waits for was forked, in seconds of ``time.monotonic()``, if it is not
    #: this one.
    born_at_s: float | None = None


class CommandLine(Record):
    """Flags and action of one invocation; see section "Command lines" of containerd's shim contract.

    ``state`` and ``zygote`` are Hako's own: ``start`` tells the daemon where its sandbox's state directory
    is, and the zygote where its socket should be.
    """

    namespace: str = ""
    address: str = ""
    publish_binary: str = ""
    id: str = ""
    bundle: str = ""
    state: str = ""
    zygote: str = ""
    debug: bool = False
    info: bool = False
    version: bool = False
    action: str = ""


_STRING_FLAGS = {
    "namespace": "namespace",
    "address": "address",
    "publish-binary": "publish_binary",
    "id": "id",
    "bundle": "bundle",
    "state": "state",
    "zygote": "zygote",
}
_BOOLEAN_FLAGS = {"debug": "debug", "info": "info", "v": "version", "version": "version"}
# The spellings that Go's strconv.ParseBool accepts.
_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


def parse(arguments: list[str]) -> CommandLine:
    """Read flags up to the first positional argument, which is the action.

    :param arguments: the command line without the program.
    :returns: the given values, and defaults for the rest.
    :raises Refusal: if a flag is unknown, lacks its value, or is a boolean with another value.
    """
    given: dict[str, object] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        argument = rest.pop(0)
        if argument == "--":
            break
        name, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
        if name in _BOOLEAN_FLAGS:
            if equals and value not in _BOOLEANS:
                raise Refusal(f"command line: -{name}: {value!r} is not true or false; give true or false")
            given[_BOOLEAN_FLAGS[name]] = _BOOLEANS[value] if equals else True
        elif name in _STRING_FLAGS:
            if not equals and not rest:
                raise Refusal(f"command line: -{name}: the value is missing; give -{name} VALUE")
            given[_STRING_FLAGS[name]] = value if equals else rest.pop(0)
        else:
            known = ", ".join(f"-{flag}" for flag in sorted((*_STRING_FLAGS, *_BOOLEAN_FLAGS)))
            raise Refusal(f"command line: {argument}: unknown flag; known are {known}")
    if rest:
        given["action"] = rest[0]
    return CommandLine(**given)  # type: ignore[arg-type]  # the tables above pair each field with its type

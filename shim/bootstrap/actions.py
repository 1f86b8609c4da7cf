"""``containerd-shim-hako-v2`` without a zygote: does containerd's actions in tens of milliseconds.

No module from here down may import more than an action needs; ``tests/unit/shim`` counts the modules.
"""

from __future__ import annotations

from shim.bootstrap import command_line
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.bootstrap.command_line import CommandLine, Invocation

_NAME = "io.containerd.hako.v2"


def perform(
    invocation: Invocation, *, otherwise: Callable[[CommandLine], bool] | None = None
) -> tuple[int, bytes] | None:
    """Do one action.

    :param invocation: the command line and standard input.
    :param otherwise: handles a command line without an action, and tells whether there was something to do.
    :returns: the exit status and the text for standard output, or for standard error if the status is not 0;
        nothing if this is a zygote's fork and the configuration wants none.
    """
    action = "command line"
    try:
        line = command_line.parse(invocation.arguments)
        action = line.action or action
        output = _perform(line, invocation, otherwise)
    except Refusal as refusal:
        message, cause = str(refusal), type(refusal).__name__
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, cause = f"{action}: {where}{error.strerror or error}; look at the host", type(error).__name__
    else:
        return None if output is None else (0, output)
    if action == "start":
        from shim.bootstrap import failures  # noqa: PLC0415 - most starts succeed

        failures.start_failed(cause)
    return 1, _one_line(message)


def _one_line(message: str) -> bytes:
    return message.replace("\n", " ").encode(errors="replace")


def _perform(
    line: CommandLine, invocation: Invocation, otherwise: Callable[[CommandLine], bool] | None
) -> bytes | None:
    if line.info:
        return _info()
    if line.version:
        return f"containerd-shim-hako-v2:\n  Version: {_version()}\n  Runtime: {_NAME}\n".encode()
    if line.action == "start":
        from shim.bootstrap import start  # noqa: PLC0415 - the other actions do without

        return start.start(line, invocation)
    if line.action == "delete":
        from shim.bootstrap import delete  # noqa: PLC0415 - the other actions do without

        return delete.delete(line)
    if not line.action and otherwise is not None and otherwise(line):
        return b""
    raise Refusal(
        f"command line: {line.action or 'no action'}: not an action; containerd runs start and delete, "
        "people run -v and -info"
    )


def _info() -> bytes:
    from shim.bootstrap import features, wire  # noqa: PLC0415 - the other actions do without

    return wire.encode_runtime_info(name=_NAME, version=_version(), features=features.FEATURES)


def _version() -> str:
    from shim import version  # noqa: PLC0415 - the other actions do without

    return version.version()

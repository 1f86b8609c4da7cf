"""OCI process to agent message: the fields of the process, and runc's defaults for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proto.kata import oci_pb2
from shim.agent.oci_fields import copy, refusing_malformed
from shim.errors import InvalidArgument

if TYPE_CHECKING:
    from shim.sandbox.inheritance import Inheritance
    from shim.sandbox.process import Process

_NOBODYS_ID = (1 << 32) - 1  # to the kernel it means "unchanged", and therefore root


def translate_process(
    process: dict[str, Any], *, terminal: bool, inheritance: Inheritance
) -> oci_pb2.Process:
    """Translate an OCI process: a container's init or an exec.

    :param process: the process as its client describes it.
    :param terminal: the request's flag, which takes precedence over the description's.
    :param inheritance: values that it would inherit from a runtime on the host.
    :raises InvalidArgument: if it is malformed, names no program, or the guest cannot satisfy it.
    """
    message = oci_pb2.Process()
    # Present even if empty: an agent reads an absent message as "the same as the container's".
    message.Capabilities.SetInParent()
    message.User.SetInParent()
    with refusing_malformed("process"):
        _check(process)
        completed = {
            **process,
            "user": {**_user(process), "umask": None},
            "terminal": terminal,
            "env": _environment(process.get("env") or []),
            "rlimits": _rlimits(process.get("rlimits") or [], inheritance),
        }
        if process.get("oomScoreAdj") is None:
            completed["oomScoreAdj"] = inheritance.oom_score_adj
        copy(completed, message, path="process")
    return message


def umask_of(process: dict[str, Any]) -> int | None:
    """Read the umask of a container's processes; an exec cannot choose its own.

    :raises TypeError, ValueError: if it is malformed.
    """
    mask = _user(process).get("umask")
    return None if mask is None else int(mask)


def translate_exec(process: Process, *, of: dict[str, Any], inheritance: Inheritance) -> oci_pb2.Process:
    """Translate the description of an exec.

    :param process: the exec.
    :param of: the specification of its container. As with runc, the exec takes its OOM score from there, and
        the capabilities if it names none.
    :param inheritance: values that it would inherit from a runtime on the host.
    :raises InvalidArgument: as :func:`translate_process` does.
    """
    init = of.get("process") or {}
    shared = {"oomScoreAdj": init.get("oomScoreAdj")}
    if process.spec.get("capabilities") is None:
        shared["capabilities"] = init.get("capabilities")
    return translate_process(
        {**process.spec, **shared}, terminal=process.stdio.terminal, inheritance=inheritance
    )


def _check(process: dict[str, Any]) -> None:
    arguments, directory = process.get("args"), process.get("cwd") or ""
    if not arguments:
        raise InvalidArgument("process: args is empty; name the program to run")
    if not arguments[0]:
        raise InvalidArgument(
            'process: exec: "": executable file not found in $PATH; name the program to run'
        )
    if not directory.startswith("/"):
        raise InvalidArgument(f"process: cwd {directory!r}: it must be an absolute path; name a directory")
    user = _user(process)
    for number in (user.get("uid"), user.get("gid"), *(user.get("additionalGids") or [])):
        if number == _NOBODYS_ID:
            raise InvalidArgument(f"process: user: {number} is the id of no user or group; choose another")


def _user(process: dict[str, Any]) -> dict[str, Any]:
    user = process.get("user")
    return {} if user is None else {**user}


def _environment(entries: list[str]) -> list[str]:
    """Keep the last of several values of a variable; the guest finds the value of an empty ``HOME``.

    :raises InvalidArgument: if an entry is not a name and a value.
    """
    variables: dict[str, str] = {}
    for entry in entries:
        name, separator, _value = entry.partition("=")
        if not name or not separator or "\0" in entry:
            raise InvalidArgument(f"process: env: invalid environment variable {entry!r}: write NAME=VALUE")
        variables.pop(name, None)
        variables[name] = entry
    if variables.get("HOME") == "HOME=":
        del variables["HOME"]
    return list(variables.values())


def _rlimits(named: list[dict[str, Any]], inheritance: Inheritance) -> list[dict[str, Any]]:
    types = {limit["type"] for limit in named}
    handed_down = [
        {"type": kind, "soft": soft, "hard": hard}
        for kind, (soft, hard) in inheritance.rlimits.items()
        if kind not in types
    ]
    return [*handed_down, *named]

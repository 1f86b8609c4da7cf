"""Turns errors of a stock Kata agent into one-line errors of the shim.

Its messages are Rust's ``Debug`` output of an error: an anyhow error with its causes and maybe the agent's
stack, one of these as a quoted string, or a ttrpc status inside another one.
"""

from __future__ import annotations

import re

from shim.errors import DeadlineExceeded, InvalidArgument, NotFound, ShimError, Unavailable, Unimplemented

_STATUS = re.compile(r'^rpc status: Status { code: ([A-Z_]+), message: "((?:[^"\\]|\\.)*)"')
_NUMBER = re.compile(r"^\d+: ")  # of a cause
_ESCAPED = re.compile(r"\\(.)")
_CHARACTERS = {"n": "\n", "t": "\t", "r": ""}
_CLASSES: dict[str, type[ShimError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "NOT_FOUND": NotFound,
    "UNIMPLEMENTED": Unimplemented,
    "UNAVAILABLE": Unavailable,
}
_NO_HANDLER = re.compile(r"^/grpc\.AgentService/\w+ is not supported$")


def plain(error: ShimError) -> ShimError:
    """Translate an agent's error.

    :param error: the error as it arrived.
    :returns: the same error if it needs no change.
    """
    message = str(error)
    kind: type[ShimError] = type(error)
    status = _STATUS.match(message)
    if status:
        kind, message = _CLASSES.get(status[1], kind), _unquoted(status[2])
    elif len(message) > 1 and message[0] == message[-1] == '"':
        message = _unquoted(message[1:-1])
    elif _NO_HANDLER.match(message):  # the agent knows the method but does not implement it
        kind = Unimplemented
    message = _in_one_line(message)
    return error if kind is type(error) and message == str(error) else kind(message)


def _unquoted(text: str) -> str:
    return _ESCAPED.sub(lambda found: _CHARACTERS.get(found[1], found[1]), text)


def _in_one_line(message: str) -> str:
    if "\n" not in message:
        return message
    told, _, _ = message.partition("Stack backtrace:")
    lines = (_NUMBER.sub("", line.strip()) for line in told.splitlines())
    return ": ".join(line for line in lines if line and line != "Caused by:")

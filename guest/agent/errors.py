"""Errors that a handler answers with, each with the status code of the protocol."""

# ruff: noqa: N818 - the names are those of the wire statuses

from __future__ import annotations


def cause(error: OSError) -> str:
    """Describe a system error, without the number that Python puts before it.

    :param error: the refusal.
    """
    words = error.strerror or str(error)
    return words if error.filename is None else f"{error.filename}: {words}"


class AgentError(Exception):
    """Root: anything that fails inside a handler (INTERNAL)."""

    code = 13


class InvalidArgument(AgentError):
    """The request cannot be honoured as it stands, or names an unknown container (INVALID_ARGUMENT)."""

    code = 3


class DeadlineExceeded(AgentError):
    """The caller's time ran out (DEADLINE_EXCEEDED)."""

    code = 4


class NotFound(AgentError):
    """The process does not exist, or no longer exists (NOT_FOUND)."""

    code = 5


class ResourceExhausted(AgentError):
    """A message is larger than a frame may be (RESOURCE_EXHAUSTED)."""

    code = 8


class Unimplemented(AgentError):
    """The method is not offered (UNIMPLEMENTED)."""

    code = 12


class Unavailable(AgentError):
    """The object lacks what the call needs, such as a terminal (UNAVAILABLE)."""

    code = 14


class Cancelled(AgentError):
    """The caller's connection is gone, so the answer has no reader (CANCELLED)."""

    code = 1

"""The error tree of the shim, split by the caller's remedy.

::

    ShimError
     ├── InvalidArgument      fix the request
     ├── NotFound             the object does not exist (any longer); treat it as deleted
     ├── AlreadyExists        choose another id
     ├── FailedPrecondition   wait for another state, then call again
     ├── ResourceExhausted    make it smaller
     ├── Unimplemented        do not use it; nothing was done
     ├── DeadlineExceeded     it may still take effect; look at the state
     ├── Unavailable          the peer is gone; the sandbox is ending
     └── Internal             a defect or a host failure; read the log

Each class carries its wire code (the gRPC status number, which ttrpc shares), so no transport
needs its own table. The message is one line: phase, object, cause, remedy.
"""

# ruff: noqa: N818 - the names are those of the wire statuses
from __future__ import annotations

from typing import ClassVar


class ShimError(Exception):
    """Root of every error that may reach containerd."""

    code: ClassVar[int] = 2


class InvalidArgument(ShimError):
    """The request cannot be honoured as it stands."""

    code = 3


class DeadlineExceeded(ShimError):
    """The time allowed ran out; the operation may still take effect."""

    code = 4


class NotFound(ShimError):
    """The container, process or sandbox does not exist, or no longer exists."""

    code = 5


class AlreadyExists(ShimError):
    """The id is taken."""

    code = 6


class ResourceExhausted(ShimError):
    """A limit was reached: a message too large, no free slot."""

    code = 8


class FailedPrecondition(ShimError):
    """The object is in a state that does not allow the operation."""

    code = 9


class Unimplemented(ShimError):
    """The operation is not offered; nothing was changed."""

    code = 12


class Internal(ShimError):
    """A failure of the host, of the guest or of Hako itself."""

    code = 13


class Unavailable(ShimError):
    """The peer (guest agent, virtual machine) is gone or does not answer."""

    code = 14


def _leaves() -> dict[int, type[ShimError]]:
    return {leaf.code: leaf for leaf in ShimError.__subclasses__()}


def from_code(code: int, message: str) -> ShimError:
    """Build the error that a peer's status number stands for.

    :param code: a gRPC status number other than 0.
    :param message: the peer's text, kept as it is.
    :returns: the matching leaf, or the root class (code 2, unknown) for a number without one.
    """
    return _leaves().get(code, ShimError)(message)

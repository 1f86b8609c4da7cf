"""The protocol by which the zygote works for other processes: the socket, and the messages on it.

Every ``start`` of containerd pays for the imports here, so they are only modules that are built into the
interpreter.
"""

import posix
import sys

ZYGOTE_DIRECTORY = "/run/hako/zygote"
"""The directory of zygotes' sockets. It is fixed, because the configuration is not read here."""

ACCEPTED = b"\1"
"""The zygote's first message: the request will be done, or the connection will break."""

REFUSED = b"\0"
"""The zygote's first message if the caller must do the work itself."""

DONE = b"\0"
"""The caller's last message: containerd has the answer."""

MAX_ANSWER = 1 << 16
"""Length of the longest answer: the exit status, and the text for standard output or error."""

_MAX_INPUT = (10 << 20) + 1
_HASH_MODULUS = (1 << 61) - 1


def read_input() -> bytes:
    """Read standard input until it ends, or is longer than anything that is accepted."""
    data = block = posix.read(0, 1 << 16)
    while block and len(data) < _MAX_INPUT:
        block = posix.read(0, 1 << 16)
        data += block
    return data


def socket_path(identity: str) -> str:
    """Return the path of a zygote's socket.

    :param identity: the result of :func:`identity_of`. The zygote tells callers apart that share a socket.
    """
    # hash() differs from run to run, and importing hashlib takes as long as everything else.
    return f"{ZYGOTE_DIRECTORY}/{int.from_bytes(identity.encode(), 'big') % _HASH_MODULUS:x}"


def identity_of(address: str) -> str:
    """Identify the zygote for this process: the one of the same program and the same containerd.

    :param address: containerd's, as on the command line.
    """
    return f"{sys.executable}\n{sys.argv[0]}\n{__file__}\n{address}"


def user_of(credentials: bytes) -> int:
    """Read the uid from the credentials of a socket's peer: pid, uid, gid; see ``man 7 unix``."""
    return int.from_bytes(credentials[4:8], sys.byteorder)


def write(descriptor: int, data: bytes) -> None:
    """Write all of the data."""
    while data:
        data = data[posix.write(descriptor, data) :]

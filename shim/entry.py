"""The entry point: have the zygote do ``start`` or ``delete``, or else do it here.

What is imported here costs containerd's every ``start``: only what is part of the interpreter. ``start`` in a
process that is warm already takes a tenth of the time that importing its modules takes. Nobody depends on the
zygote: without one, with one of another version, and whenever it dies, everything is done here.
"""

import marshal
import posix
import sys
import time

ZYGOTE_DIRECTORY = "/run/hako/zygote"
"""Where the sockets of zygotes are. The configuration is not read here, so it cannot say."""

ACCEPTED = b"\1"
"""The zygote's first message: the request will be done, or the connection will break."""

REFUSED = b"\0"
"""Its first message if the caller has to do it itself."""

DONE = b"\0"
"""The caller's last message: containerd has the answer."""

MAX_ANSWER = 1 << 16
"""Length of the longest answer: the exit status, and what goes to standard output or error."""

_ACCEPT_TIMEOUT_S = 1.0
_MAX_INPUT = (10 << 20) + 1
_HASH_MODULUS = (1 << 61) - 1


def main() -> int:
    """Do what the command line says; the entry point of the console script.

    :returns: the exit status.
    """
    sent = None
    if sys.argv[-1] in {"start", "delete"}:
        # Read first, so that it is still there if the zygote dies over it.
        sent = read_input() if sys.argv[-1] == "start" else b""
        status = _ask(sent)
        if status is not None:
            posix._exit(status)  # noqa: SLF001 - its name; there is nothing to clean up, which takes a while
    from shim import bootstrap  # noqa: PLC0415 - the zygote spares us all of this

    return bootstrap.main(sent)


def read_input() -> bytes:
    """Read standard input until it ends, or is longer than anything that is accepted."""
    data = block = posix.read(0, 1 << 16)
    while block and len(data) < _MAX_INPUT:
        block = posix.read(0, 1 << 16)
        data += block
    return data


def socket_path(identity: str) -> str:
    """Place the socket of a zygote.

    :param identity: as :func:`identity_of` has it. Two that share a socket are told apart by the zygote.
    """
    # hash() differs from run to run, and hashlib takes as long to import as all the rest takes.
    return f"{ZYGOTE_DIRECTORY}/{int.from_bytes(identity.encode(), 'big') % _HASH_MODULUS:x}"


def identity_of(address: str) -> str:
    """Say which zygote may stand in for this process: that of the same program for the same containerd.

    :param address: containerd's, as on the command line.
    """
    return f"{sys.executable}\n{sys.argv[0]}\n{__file__}\n{address}"


def address_of(arguments: list[str]) -> str:
    """Find containerd's address in a command line; it always gives one, in two words."""
    return arguments[arguments.index("-address") + 1] if "-address" in arguments[:-1] else ""


def user_of(credentials: bytes) -> int:
    """Read the uid of a socket's peer out of its credentials: pid, uid, gid; see ``man 7 unix``."""
    return int.from_bytes(credentials[4:8], sys.byteorder)


def _ask(sent: bytes) -> int | None:
    """Have the zygote do it.

    :param sent: the standard input.
    :returns: the exit status; nothing if it has to be done here.
    """
    import _socket  # noqa: PLC0415 - to run the daemon takes another

    identity = identity_of(address_of(sys.argv))
    born_at_s = time.monotonic() - time.process_time()
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    connection.settimeout(_ACCEPT_TIMEOUT_S)
    try:
        where = posix.getcwd()
        request = (identity, posix.getppid(), where, sys.argv[1:], posix.environ, sent, born_at_s)
        connection.connect(socket_path(identity))
        if user_of(connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)) != posix.geteuid():
            return None  # the environment may hold secrets
        connection.send(marshal.dumps(request))
        if connection.recv(1) != ACCEPTED:
            return None
        connection.settimeout(None)
        answer = connection.recv(MAX_ANSWER)
    except OSError:
        return None
    if not answer:
        return None
    status, text = answer[0], answer[1:]
    write(2 if status else 1, text)
    try:  # noqa: SIM105 - importing contextlib takes longer than all this
        connection.send(DONE)
    except OSError:
        pass  # it is gone, because it made no shim
    return status


def write(descriptor: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[posix.write(descriptor, data) :]

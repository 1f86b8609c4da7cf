"""The entry point: let the zygote do ``start`` or ``delete``, or else do it here.

Every ``start`` of containerd pays for the imports here, so this imports only modules that are built into the
interpreter. Importing the modules of ``start`` takes ten times as long as ``start`` in a warm process. The
zygote is optional: without one, with one of another version, and after its death, this process does the work.
"""

import marshal
import posix
import sys
import time

from shim import zygote_protocol
from shim.zygote_protocol import ACCEPTED, DONE, MAX_ANSWER

_ACCEPT_TIMEOUT_S = 1.0


def main() -> int:
    """Run the action of the command line; the entry point of the console script.

    :returns: the exit status.
    """
    sent = None
    if sys.argv[-1] in {"start", "delete"}:
        # Read first, so that it is still available if the zygote dies during the request.
        sent = zygote_protocol.read_input() if sys.argv[-1] == "start" else b""
        status = _ask(sent)
        if status is not None:
            posix._exit(status)  # noqa: SLF001 - its name; clean-up would take time, and is not needed
    from shim.bootstrap import __main__ as bootstrap  # noqa: PLC0415 - with a zygote, this import is not needed

    return bootstrap.main(sent)


def address_of(arguments: list[str]) -> str:
    """Find containerd's address in a command line, which always has one, in two words."""
    return arguments[arguments.index("-address") + 1] if "-address" in arguments[:-1] else ""


def _ask(sent: bytes) -> int | None:
    """Let the zygote do it.

    :param sent: the standard input.
    :returns: the exit status; None if it must be done here.
    """
    import _socket  # noqa: PLC0415 - the daemon's command line needs another one

    identity = zygote_protocol.identity_of(address_of(sys.argv))
    born_at_s = time.monotonic() - time.process_time()
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    connection.settimeout(_ACCEPT_TIMEOUT_S)
    try:
        where = posix.getcwd()
        request = (identity, posix.getppid(), where, sys.argv[1:], posix.environ, sent, born_at_s)
        connection.connect(zygote_protocol.socket_path(identity))
        credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        if zygote_protocol.user_of(credentials) != posix.geteuid():
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
    zygote_protocol.write(2 if status else 1, text)
    try:  # noqa: SIM105 - importing contextlib takes longer than all this
        connection.send(DONE)
    except OSError:
        pass  # it has ended, because it made no shim
    return status

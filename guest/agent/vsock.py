"""The agent's vsock listeners: they accept any number of connections, but only from the host."""

from __future__ import annotations

import _socket
import _thread
import os

from guest.agent import workers
from guest.agent.console import log
from guest.agent.ttrpc import Connection
from proto.extensions import AGENT_PORT, PRIVILEGED_PARAMETER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ttrpc import Server

_ANY_CID = 0xFFFFFFFF
_HOST_CID = 2
_PRIVILEGED_END = 1024  # vsock(7): a process needs CAP_NET_BIND_SERVICE for a port below


class Listener:
    """A port that only the host can connect to; a container could reach it through the guest's loopback.

    :param port: the port.
    :param command_line: the kernel's, which may say that unprivileged users of the host can connect, too.
    :raises OSError: if the kernel has no vsock, or the port is taken.
    """

    def __init__(self, port: int, command_line: str) -> None:
        self._port = port
        self._ports_end = _PRIVILEGED_END if PRIVILEGED_PARAMETER in command_line.split() else _ANY_CID
        self._socket = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
        self._socket.bind((_ANY_CID, port))
        self._socket.listen(16)
        self._refused = False

    def accept(self) -> tuple[int, int]:
        """Wait for a connection of the host's; others are closed.

        :returns: its descriptor, the caller's to close, and the port that it comes from.
        """
        while True:
            # The base class of socket.socket has only this method, and the guest lacks socket.socket.
            fd, (cid, port) = self._socket._accept()  # type: ignore[attr-defined]  # noqa: SLF001
            if cid == _HOST_CID and port < self._ports_end:
                return fd, port
            os.close(fd)
            if not self._refused:  # only once, because a refused caller may try again and again
                self._refused = True
                log(f"vsock: port {self._port}: refused a connection from CID {cid}, port {port}")


class _Stream:
    """A connected vsock socket."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        os.close(self._fd)


def listen(server: Server, command_line: str) -> None:
    """Accept connections on the agent's port, each served by a thread.

    :param server: the services on offer.
    :param command_line: the kernel's.
    :raises OSError: if the kernel has no vsock, or the port is taken.
    """
    _thread.start_new_thread(_accept, (Listener(AGENT_PORT, command_line), server))


def _accept(listener: Listener, server: Server) -> None:
    while True:
        fd, _port = listener.accept()
        _serve(_Stream(fd), server)


def _serve(stream: _Stream, server: Server) -> None:
    def serve() -> None:
        Connection(stream, server).serve()
        stream.close()

    workers.submit(serve)

"""The agent's vsock listener: as many connections as the host likes."""

from __future__ import annotations

import _socket
import _thread
import os

from guest.agent import workers
from guest.agent.ttrpc import Connection
from proto.extensions import AGENT_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ttrpc import Server

ANY_CID = 0xFFFFFFFF


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


def listen(server: Server) -> None:
    """Accept connections on the agent's port, each served by a thread.

    :param server: the services on offer.
    :raises OSError: if the kernel has no vsock, or the port is taken.
    """
    listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    listener.bind((ANY_CID, AGENT_PORT))
    listener.listen(16)
    _thread.start_new_thread(_accept, (listener, server))


def _accept(listener: _socket.socket, server: Server) -> None:
    while True:
        fd, _address = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  the base class of socket.socket
        _serve(_Stream(fd), server)


def _serve(stream: _Stream, server: Server) -> None:
    def serve() -> None:
        Connection(stream, server).serve()
        stream.close()

    workers.submit(serve)

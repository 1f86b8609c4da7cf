"""A stream socket that is read to its end, even if the peer has ended before it read everything."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from hypervisor.override import override

if TYPE_CHECKING:
    from typing_extensions import Buffer


class LastingSocket(socket.socket):
    """A connection that ends with the end of file, after everything that the peer sent.

    asyncio gives a connection up at its first error and drops what it has not read. That may be the answer
    to an earlier request, or the event that says why the peer ended.

    :param connected: the connected stream socket, whose descriptor this object takes over.
    """

    def __init__(self, connected: socket.socket) -> None:
        super().__init__(fileno=connected.detach())

    @override
    def send(self, data: Buffer, flags: int = 0, /) -> int:
        """Send bytes, or drop them if the peer has ended."""
        try:
            return super().send(data, flags)
        except (BrokenPipeError, ConnectionResetError):
            return memoryview(data).nbytes

    @override
    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Receive bytes; none after the end of the peer, even if it has not read everything."""
        try:
            return super().recv(size, flags)
        except ConnectionResetError:
            return b""

"""Notice that a network namespace changes: interfaces, addresses and routes of it come or go.

What has changed is not read from the messages: whoever wants to know scans the namespace again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

_MESSAGE_BYTES = 1 << 16
# The groups are those of rtnetlink(7).
_LINKS = 0x1
_ADDRESSES = 0x10 | 0x100  # IPv4, IPv6
_ROUTES = 0x40 | 0x400


class Changes:
    """The changes of the namespace of the thread that opens them, from then on."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.bind((0, _LINKS | _ADDRESSES | _ROUTES))

    async def wait(self) -> None:
        """Wait for the next change; many at once are one."""
        loop, happened = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._socket, happened.set)
        try:
            await happened.wait()
        finally:
            loop.remove_reader(self._socket)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take()

    def _take(self) -> None:
        try:
            self._socket.recv(_MESSAGE_BYTES)
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # there were more than the kernel keeps, and more may follow
                raise

    def close(self) -> None:
        """Notice no more; nobody may be waiting."""
        self._socket.close()

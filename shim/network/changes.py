"""Detects changes of a network namespace: of its interfaces, addresses, routes and rules.

The messages are not decoded: after a change, the namespace is scanned again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

_MESSAGE_BYTES = 1 << 16
# The groups are those of rtnetlink(7).
_LINKS = 0x1
_NEIGHBOURS = 0x4
_ADDRESSES = 0x10 | 0x100  # IPv4, IPv6
_ROUTES = 0x40 | 0x400
_RULES = 0x80 | 0x40000
_SETTINGS = 0x800000 | 0x1000000  # the kernel reports only some parameters, such as forwarding and rp_filter
_RULES_OF_FILTERS = 0x40  # linux/netfilter/nfnetlink.h, NFNLGRP_NFTABLES
_NETLINK_NETFILTER = 12


class Changes:
    """Changes in the namespace of the thread that makes this object, from then on."""

    def __init__(self) -> None:
        groups = _LINKS | _NEIGHBOURS | _ADDRESSES | _ROUTES | _RULES | _SETTINGS
        self._sockets = [_listening(socket.NETLINK_ROUTE, groups)]
        with contextlib.suppress(OSError):  # a kernel without packet filters
            self._sockets.append(_listening(_NETLINK_NETFILTER, _RULES_OF_FILTERS))

    async def wait(self) -> None:
        """Wait for the next change; changes at the same time count as one."""
        loop, happened = asyncio.get_running_loop(), asyncio.Event()
        for each in self._sockets:
            loop.add_reader(each, happened.set)
        try:
            await happened.wait()
        finally:
            for each in self._sockets:
                loop.remove_reader(each)
        for each in self._sockets:
            with contextlib.suppress(BlockingIOError):
                while True:
                    _take(each)

    def close(self) -> None:
        """Stop; no call of :meth:`wait` may be in progress."""
        for each in self._sockets:
            each.close()


def _listening(protocol: int, groups: int) -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    opened = socket.socket(socket.AF_NETLINK, kind, protocol)
    try:
        opened.bind((0, groups))
    except OSError:
        opened.close()
        raise
    return opened


def _take(opened: socket.socket) -> None:
    try:
        opened.recv(_MESSAGE_BYTES)
    except OSError as error:
        if (
            error.errno != errno.ENOBUFS
        ):  # there were more messages than the kernel keeps, and more may follow
            raise

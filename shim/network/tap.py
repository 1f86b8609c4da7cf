"""Taps: interfaces that end in a file descriptor; see Documentation/networking/tuntap.rst of Linux."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000


def open_tap(name: str, *, queues: int) -> tuple[int, ...]:
    """Make a tap in the calling thread's network namespace; it is gone when its last descriptor is closed.

    :param name: its name, at most 15 bytes.
    :param queues: how many packets can be moved at once.
    :returns: one descriptor for each queue, non-blocking.
    :raises OSError: if the kernel refuses, with EBUSY if there is such an interface.
    """
    request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_MULTI_QUEUE)
    with contextlib.ExitStack() as opened:
        descriptors = []
        for _ in range(queues):
            descriptors.append(os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            opened.callback(os.close, descriptors[-1])
            fcntl.ioctl(descriptors[-1], _TUNSETIFF, request)
        opened.pop_all()
    return tuple(descriptors)

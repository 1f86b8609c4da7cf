"""Queue pairs of network cards: a card uses one pair for each processor.

A card has a pair for each processor that the machine can have. Its driver uses one pair for each processor
that existed when it found the card. Interface: include/uapi/linux/ethtool.h.
"""

from __future__ import annotations

import _socket
import array
import fcntl
import os
import struct

from guest.agent.console import log

_NET = "/sys/class/net"
_VIRTIO_NET = "virtio_net"
_SIOCETHTOOL = 0x8946
_GET, _SET = 0x3C, 0x3D
_REQUEST = struct.Struct("@16sP16x")
"""A ``struct ifreq`` with a pointer in it."""

_WORDS = 9
_MOST_COMBINED, _COMBINED = 4, 8
"""Offsets in ``struct ethtool_channels``, whose first word is the command."""


def use(processors: int) -> None:
    """Let each virtio card use a pair for each processor, if it has enough; a failure costs only speed.

    :param processors: how many there are.
    """
    with_driver = [name for name in os.listdir(_NET) if _driver(name) == _VIRTIO_NET]
    if not with_driver:
        return
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        for name in with_driver:
            try:
                _use(control.fileno(), name, processors)
            except OSError as error:
                log(f"network: {name}: its queues stay as they are: {error}")
    finally:
        control.close()


def _use(control: int, name: str, processors: int) -> None:
    channels = array.array("I", [0] * _WORDS)
    request = _REQUEST.pack(name.encode(), channels.buffer_info()[0])
    channels[0] = _GET
    fcntl.ioctl(control, _SIOCETHTOOL, request)
    wanted = min(processors, channels[_MOST_COMBINED])
    if wanted != channels[_COMBINED]:
        channels[0], channels[_COMBINED] = _SET, wanted
        fcntl.ioctl(control, _SIOCETHTOOL, request)


def _driver(name: str) -> str:
    try:
        return os.readlink(f"{_NET}/{name}/device/driver").rpartition("/")[2]
    except OSError:  # not a device, such as the loopback
        return ""

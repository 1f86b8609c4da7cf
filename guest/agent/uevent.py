"""Waits for devices: the kernel announces each device (uevents), and sysfs lists them."""

from __future__ import annotations

import _socket
import errno
import os
import select
import time

from guest.agent import modules
from guest.agent.errors import AgentError, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Found = TypeVar("Found")

PLUG_TIMEOUT_S = 20.0
"""How long a device that was plugged may take to appear; emulated machines are slow."""

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_PCI_ROOT = "/sys/devices/pci0000:00"
_SLOTS, _FUNCTIONS = 0x20, 8
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")
# A block device that is being added or has just been removed.
_NOT_READY = frozenset({errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM})


def wait_for(look: Callable[[], Found | None], *, what: str, timeout_s: float = PLUG_TIMEOUT_S) -> Found:
    """Look for something at once, and again after each of the kernel's announcements, until it is found.

    No announcement is missed, because they are received from before the first look on.

    :param look: returns the device, or None.
    :param what: names it in the error, such as ``disk: 02/00``.
    :param timeout_s: when to give up.
    :returns: the device.
    :raises AgentError: if it is not found in time.
    """
    deadline = time.monotonic() + timeout_s
    channel = _socket.socket(
        _socket.AF_NETLINK, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
    )
    try:
        channel.bind((0, _KERNEL_GROUP))
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        while (found := look()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise AgentError(f"{what}: it did not appear in {timeout_s:.0f} s; see the guest's console")
            if poll.poll(int(left * 1000) + 1):
                _drain(channel)
    finally:
        channel.close()
    return found


def _drain(channel: _socket.socket) -> None:
    """Read all announcements; their content does not matter, because sysfs is read anyway."""
    while True:
        try:
            channel.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            # Some were lost, but they would only have woken this thread.
            if error.errno != errno.ENOBUFS:
                raise


def _slot(part: str) -> tuple[int, int] | None:
    slot, dot, function = part.partition(".")
    if not slot or not _HEXADECIMAL.issuperset(slot + function) or bool(dot) is not bool(function):
        return None
    number = int(slot, 16), int(function or "0", 16)
    return number if number[0] < _SLOTS and number[1] < _FUNCTIONS else None


def pci_directory(path: str) -> str | None:
    """Find a PCI device in sysfs.

    :param path: its slots from the root bus down, the form of Kata's protocol (reference, section 2.6).
    :returns: its directory, or None if there is no such device now.
    :raises InvalidArgument: if the path has another form.
    """
    directory, bus = _PCI_ROOT, "0000:00"
    for index, part in enumerate(path.split("/")):
        slot = _slot(part)
        if slot is None:
            raise InvalidArgument(f"device: {path}: not a PCI path; write slots like 02/00")
        if index:
            buses = _entries(f"{directory}/pci_bus")
            if not buses:
                return None
            bus = buses[0]
        directory = f"{directory}/{bus}:{slot[0]:02x}.{slot[1]}"
    return directory if os.path.isdir(directory) else None


def virtio_children(path: str, kind: str) -> list[str]:
    """Return the name of the device that a virtio driver has made.

    :param path: PCI path of the device.
    :param kind: class of the children: ``block`` or ``net``.
    :returns: names such as ``vda`` or ``eth0``; empty while there is no device or driver.
    :raises InvalidArgument: if the path is malformed.
    """
    device = pci_directory(path)
    if device is None:
        return []
    return [
        child
        for entry in _entries(device)
        if entry.startswith("virtio")
        for child in _entries(f"{device}/{entry}/{kind}")
    ]


def _entries(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def disk(source: str, *, timeout_s: float = PLUG_TIMEOUT_S) -> str:
    """Wait for a disk until it can be opened.

    :param source: PCI path of a virtio disk, or a name under /dev.
    :param timeout_s: when to give up.
    :returns: its node.
    :raises AgentError: if it does not appear in time.
    :raises InvalidArgument: if the source has neither form.
    """
    modules.load("virtio_blk")

    def look() -> str | None:
        nodes = (
            [source]
            if source.startswith("/dev/")
            else [f"/dev/{name}" for name in virtio_children(source, "block")]
        )
        return next((node for node in nodes if _opens(node)), None)

    return wait_for(look, what=f"disk: {source}", timeout_s=timeout_s)


def _opens(node: str) -> bool:
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in _NOT_READY:
            return False
        raise
    return True


def interface(path: str, *, timeout_s: float = PLUG_TIMEOUT_S) -> str:
    """Wait for a network interface.

    :param path: PCI path of a virtio network device.
    :param timeout_s: when to give up.
    :returns: the interface's present name.
    :raises AgentError: if it does not appear in time.
    :raises InvalidArgument: if the path is malformed.
    """
    modules.load("virtio_net")
    return wait_for(
        lambda: next(iter(virtio_children(path, "net")), None), what=f"interface: {path}", timeout_s=timeout_s
    )

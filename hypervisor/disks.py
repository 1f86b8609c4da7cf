"""Disks: a file or block device of the host, rate limits over it, and a virtio-blk device in the guest."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.devices import Command, Description
from hypervisor.errors import HotplugError
from hypervisor.qmp import CommandRefusedError

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.devices import Devices
    from hypervisor.interface import Disk, DiskLimits
    from hypervisor.qmp import QmpSession

_SERIAL_BYTES = 20
"""The length of a disk's id (virtio 1.2, 5.2.6: ``VIRTIO_BLK_T_GET_ID``)."""

_FAST_IO = "io_uring"
_PLAIN_IO = "threads"


@dataclass(frozen=True, slots=True)
class Names:
    """QEMU's names of one disk's parts. An id would be too long: a node's name has at most 31 characters.

    :param number: one that no other disk of the virtual machine ever had.
    """

    number: int

    @property
    def top(self) -> str:
        """The node that the device reads and writes."""
        return f"disk{self.number}"

    @property
    def file(self) -> str:
        """The node that reads and writes on the host."""
        return f"disk{self.number}-file"

    @property
    def limits(self) -> str:
        """The object that holds the rate limits."""
        return f"disk{self.number}-limits"

    @property
    def thread(self) -> str:
        """The thread that serves its requests, so that they do not wait for QEMU's other work."""
        return f"disk{self.number}-thread"


def describe(disk: Disk, names: Names, *, block_device: bool, aio: str) -> Description:
    """Describe a disk.

    :param disk: the disk.
    :param names: the names of its parts.
    :param block_device: whether the host has a block device at its path, not a file.
    :param aio: QEMU's name for the way in which it asks the host's kernel to read and write.
    """
    access = {"read-only": disk.read_only, "discard": "unmap" if disk.discard else "ignore"}
    return Description(
        id=disk.id,
        driver="virtio-blk-pci",
        properties={
            "drive": names.top,
            "iothread": names.thread,
            "serial": disk.serial,
            "discard": disk.discard,
            "disable-legacy": "on",
            # The guest gets every error. By default, QEMU stops the whole machine when the host's file
            # system is full, until an operator looks.
            "werror": "report",
            "rerror": "report",
        },
        backend=[
            Command("object-add", {"qom-type": "iothread", "id": names.thread}),
            Command(
                "object-add",
                {"qom-type": "throttle-group", "id": names.limits, "limits": throttle(disk.limits)},
            ),
            Command(
                "blockdev-add",
                {
                    "driver": "host_device" if block_device else "file",
                    "node-name": names.file,
                    "filename": f"/dev/fdset/{names.number}",
                    "aio": aio,
                    **access,
                },
            ),
            Command(
                "blockdev-add",
                {
                    "driver": "throttle",
                    "node-name": names.top,
                    "throttle-group": names.limits,
                    "file": names.file,
                    **access,
                },
            ),
        ],
        undo=[
            Command("blockdev-del", {"node-name": names.top}),
            Command("blockdev-del", {"node-name": names.file}),
            Command("object-del", {"id": names.limits}),
            Command("object-del", {"id": names.thread}),
            Command("remove-fd", {"fdset-id": names.number}),
        ],
    )


def throttle(limits: DiskLimits) -> dict[str, int]:
    """Write rate limits as QEMU's ``ThrottleLimits``, where 0 means none.

    :param limits: the limits.
    """
    return {
        "iops-read": limits.read_iops,
        "iops-write": limits.write_iops,
        "bps-read": limits.read_bytes_per_s,
        "bps-write": limits.write_bytes_per_s,
    }


class Disks:
    """The disks of one virtual machine.

    :param session: the control connection.
    :param devices: where they are plugged.
    :param fast_io: whether QEMU may try io_uring, which fails on some hosts.
    """

    def __init__(self, session: QmpSession, devices: Devices, *, fast_io: bool = True) -> None:
        self._session = session
        self._devices = devices
        self._numbers = itertools.count()
        self._disks: dict[str, tuple[Names, Path]] = {}
        self._aio = _FAST_IO if fast_io else _PLAIN_IO

    async def plug(self, disk: Disk) -> str:
        """Add a disk.

        :param disk: the disk.
        :returns: its PCI path in the guest.
        :raises HotplugError: if it cannot be added; nothing of it is left.
        :raises QmpError: if QEMU does not answer.
        """
        if len(disk.serial.encode()) > _SERIAL_BYTES:
            raise HotplugError(
                f"plug: {disk.id}: the serial {disk.serial!r} is longer than {_SERIAL_BYTES} bytes; cut it"
            )
        names, aio = Names(next(self._numbers)), self._aio
        try:
            path = await self._plug(disk, names, aio)
        except HotplugError as error:
            if aio not in str(error) or aio == _PLAIN_IO:
                raise
            # QEMU was built without it, or the kernel forbids it. It is not tried again.
            self._aio = _PLAIN_IO
            return await self.plug(disk)
        self._disks[disk.id] = names, disk.path
        return path

    async def _plug(self, disk: Disk, names: Names, aio: str) -> str:
        block_device = _is_block_device(disk)
        # By descriptor, because QEMU does not see the host's files.
        file = _open(disk)
        try:
            await self._session.add_fd(file, names.number)
        finally:
            os.close(file)
        try:
            return await self._devices.plug(describe(disk, names, block_device=block_device, aio=aio))
        except HotplugError:
            with contextlib.suppress(CommandRefusedError):  # refused if the undo of the disk has removed it
                await self._session.ask(dict, "remove-fd", {"fdset-id": names.number})
            raise

    async def resize(self, name: str) -> int:
        """Tell the guest the present size of the file or device behind a disk.

        :param name: the disk's id.
        :returns: the size, in bytes.
        :raises HotplugError: if there is no such disk, or QEMU refuses.
        :raises QmpError: if QEMU does not answer.
        """
        names, path = self._find("resize", name)
        try:
            size = _size(path)
            await self._session.ask(dict, "block_resize", {"node-name": names.top, "size": size})
        except (CommandRefusedError, OSError) as error:
            raise HotplugError(f"resize: {name}: {error}") from error
        return size

    async def limit(self, name: str, limits: DiskLimits) -> None:
        """Replace a disk's rate limits.

        :param name: the disk's id.
        :param limits: the new ones.
        :raises HotplugError: if there is no such disk, or QEMU refuses.
        :raises QmpError: if QEMU does not answer.
        """
        names, _path = self._find("limit", name)
        arguments = {"path": f"/objects/{names.limits}", "property": "limits", "value": throttle(limits)}
        try:
            await self._session.ask(dict, "qom-set", arguments)
        except CommandRefusedError as error:
            raise HotplugError(f"limit: {name}: {error}") from error

    def _find(self, action: str, name: str) -> tuple[Names, Path]:
        if name not in self._disks or name not in self._devices:
            raise HotplugError(f"{action}: {name}: no such disk is plugged")
        return self._disks[name]


def _is_block_device(disk: Disk) -> bool:
    try:
        mode = disk.path.stat().st_mode
    except OSError as error:
        raise HotplugError(f"plug: {disk.id}: {disk.path}: {error.strerror}") from error
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise HotplugError(
            f"plug: {disk.id}: {disk.path}: neither a file nor a block device; give one of these"
        )
    return stat.S_ISBLK(mode)


def _open(disk: Disk) -> int:
    try:
        return os.open(disk.path, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise HotplugError(f"plug: {disk.id}: {disk.path}: {error.strerror}") from error


def _size(path: Path) -> int:
    # The file's end tells its size. The kernel's stat gives none for a block device.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)

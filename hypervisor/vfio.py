"""PCI devices of the host that a guest drives itself, through VFIO."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.devices import Command, Description
from hypervisor.errors import HotplugError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor.devices import Devices
    from hypervisor.interface import HostPciDevice

_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_DRIVER = "vfio-pci"
_IOMMUFD = "iommufd"

_SYSFS = Path("/sys")
_VFIO = Path("/dev/vfio")
_IOMMUFD_DEVICE = Path("/dev/iommu")
"""The newer of the kernel's two ways to map a guest's memory for a device; it exists since Linux 6.2."""

_GIB = 1 << 30
_LEAST_S, _PER_GIB_S, _MOST_S = 60.0, 40.0, 1200.0
"""An emulated host was measured to pin a gigabyte in 17 s when idle, and half of one in more than 30 s when
busy; others take a second or less."""


def pinning_timeout_s(memory_bytes: int) -> float:
    """Return how long QEMU may be busy with memory that devices of the host will reach, in seconds.

    The kernel pins all of it at once, and QEMU answers no command until that is done.

    :param memory_bytes: how much memory.
    """
    return min(_LEAST_S + _PER_GIB_S * memory_bytes / _GIB, _MOST_S)


async def plug(device: HostPciDevice, *, devices: Devices, memory_bytes: int) -> str:
    """Give the guest a device of the host.

    :param device: the device.
    :param memory_bytes: the guest's memory now, which the device will reach.
    :param devices: where it is plugged.
    :returns: its PCI path in the guest.
    :raises HotplugError: if the host cannot give it away, or QEMU refuses; nothing of it is left.
    :raises QmpError: if QEMU does not answer.
    """
    check(device, sysfs=_SYSFS)
    if _host_has_iommufd():
        try:
            return await devices.plug(describe(device, iommufd=True, memory_bytes=memory_bytes))
        except HotplugError as error:
            if _IOMMUFD not in str(error):
                raise
            # QEMU before 9.0 knows only the older way.
    return await devices.plug(describe(device, iommufd=False, memory_bytes=memory_bytes))


def check(device: HostPciDevice, *, sysfs: Path) -> None:
    """Check that the host can give a device away.

    :param device: the device.
    :param sysfs: where the kernel's sysfs is mounted.
    :raises HotplugError: if the address is malformed, there is no such device, the host has no IOMMU, or
        another driver has the device.
    """
    what = f"plug: {device.id}: PCI device {device.address}"
    if not _ADDRESS.fullmatch(device.address):
        raise HotplugError(f"{what}: not an address like 0000:3b:00.0; give the one that lspci -D shows")
    groups = sysfs / "kernel/iommu_groups"
    if not groups.is_dir() or not any(groups.iterdir()):
        raise HotplugError(
            f"{what}: the host has no IOMMU to keep it to the guest's memory; switch it on in the firmware "
            "and boot the host with intel_iommu=on or amd_iommu=on"
        )
    place = sysfs / "bus/pci/devices" / device.address
    if not place.exists():
        raise HotplugError(f"{what}: the host has no such device; give one that lspci -D shows")
    link = place / "driver"
    driver = link.readlink().name if link.is_symlink() else "none"
    if driver != _DRIVER:
        raise HotplugError(
            f"{what}: its driver is {driver}, not {_DRIVER}; bind it with: driverctl set-override "
            f"{device.address} {_DRIVER}"
        )


def nodes(device: HostPciDevice, *, sysfs: Path = _SYSFS) -> list[Path]:
    """List the device nodes through which QEMU drives a device: of both ways, as far as the host has them.

    :param device: the device.
    :param sysfs: where the kernel's sysfs is mounted.
    :raises HotplugError: as :func:`check`.
    """
    check(device, sysfs=sysfs)
    place = sysfs / "bus/pci/devices" / device.address
    found = [_VFIO / "vfio", _IOMMUFD_DEVICE]
    found += [_VFIO / "devices" / one.name for one in place.glob("vfio-dev/*")]
    group = place / "iommu_group"
    if group.is_symlink():
        found.append(_VFIO / group.readlink().name)
    return [node for node in found if node.exists()]


def numbers(found: Iterable[Path]) -> list[tuple[int, int]]:
    """Return the major and minor numbers of device nodes; one that is gone has none.

    :param found: their paths.
    """
    devices = []
    for node in found:
        with contextlib.suppress(FileNotFoundError):
            number = node.stat().st_rdev
            devices.append((os.major(number), os.minor(number)))
    return devices


def describe(device: HostPciDevice, *, iommufd: bool, memory_bytes: int) -> Description:
    """Describe a device of the host.

    :param device: the device.
    :param iommufd: whether memory is mapped for it through iommufd, not through a VFIO container.
    :param memory_bytes: the guest's memory now.
    """
    backend = f"{device.id}-{_IOMMUFD}"
    return Description(
        id=device.id,
        driver=_DRIVER,
        properties={"host": device.address, **({_IOMMUFD: backend} if iommufd else {})},
        backend=[Command("object-add", {"qom-type": _IOMMUFD, "id": backend})] if iommufd else [],
        undo=[Command("object-del", {"id": backend})] if iommufd else [],
        needs_port=True,
        add_timeout_s=pinning_timeout_s(memory_bytes),
    )


def _host_has_iommufd() -> bool:
    return _IOMMUFD_DEVICE.exists()

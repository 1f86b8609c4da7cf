"""The disks of the host that a container gets: its root file system, or devices that it names.

Pure, except for looking up paths and device numbers.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypervisor import DiskLimits
from shim.agent.guest_devices import allows_everything, is_of_the_guest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from proto.containerd.types_pb2 import Mount

# File systems that a guest can mount itself: those that snapshotters put on block devices and in files.
_DISK_FILE_SYSTEMS = frozenset({"ext4", "xfs"})
_LOOP = "loop"  # mount(8)'s option for a file; the guest sees a disk
_THROTTLES = {
    "throttleReadBpsDevice": "read_bytes_per_s",
    "throttleWriteBpsDevice": "write_bytes_per_s",
    "throttleReadIOPSDevice": "read_iops",
    "throttleWriteIOPSDevice": "write_iops",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RootDisk:
    """A root file system on its own disk.

    :param path: the file or block device.
    :param fstype: its file system.
    :param options: how to mount it in the guest.
    """

    path: Path
    fstype: str
    options: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        """Whether it is read-only."""
        return "ro" in self.options


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDevice:
    """A block device of the host, and the path at which a container wants it.

    :param container_path: the path in the container.
    :param major: its major number on the host.
    :param minor: its minor number on the host.
    :param read_only: whether the container may only read it.
    :param limits: how fast it may be used.
    """

    container_path: str
    major: int
    minor: int
    read_only: bool
    limits: DiskLimits

    def path(self) -> Path:
        """Find its path on the host by its number; the specification's path may differ.

        :raises OSError: if the host has no such device.
        """
        facts = Path(f"/sys/dev/block/{self.major}:{self.minor}/uevent").read_text(encoding="utf-8")
        [name] = [line.removeprefix("DEVNAME=") for line in facts.splitlines() if line.startswith("DEVNAME=")]
        return Path("/dev", name)


def root_disk(rootfs: Iterable[Mount]) -> RootDisk | None:
    """Find the disk from which the guest mounts a root file system.

    :param rootfs: containerd's mounts.
    :returns: the disk, or None if the host mounts it and shares the result.
    """
    mounts = list(rootfs)
    if len(mounts) != 1 or mounts[0].type not in _DISK_FILE_SYSTEMS or mounts[0].target:
        return None
    [mount] = mounts
    try:
        mode = os.stat(mount.source).st_mode  # noqa: PTH116 - Path.stat raises one more error
    except (OSError, ValueError):
        return None  # the mount will fail with the reason
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        return None
    options = tuple(option for option in mount.options if option != _LOOP)
    return RootDisk(path=Path(mount.source), fstype=mount.type, options=options)


def disk_devices(linux: Mapping[str, Any]) -> list[DiskDevice]:
    """Find the block devices that a container names.

    :param linux: the ``linux`` object of its specification.
    :raises KeyError, TypeError, ValueError, AttributeError: if it is malformed.
    """
    resources = linux.get("resources") or {}
    rules = resources.get("devices") or []
    if allows_everything(rules):
        return []
    found = []
    for device in linux.get("devices") or []:
        if device.get("type") == "b" and not is_of_the_guest(device, linux):
            number = int(device.get("major") or 0), int(device.get("minor") or 0)
            found.append(
                DiskDevice(
                    container_path=device["path"],
                    major=number[0],
                    minor=number[1],
                    read_only=not _may_write(rules, number),
                    limits=limits_of(resources, number),
                )
            )
    return found


def limits_of(resources: Mapping[str, Any], number: tuple[int, int]) -> DiskLimits:
    """Read the rates at which a container may use a block device.

    :param resources: the ``linux.resources`` object of its specification.
    :param number: the device's major and minor number.
    """
    block_io = resources.get("blockIO") or {}
    rates = {
        field: int(entry["rate"])
        for key, field in _THROTTLES.items()
        for entry in block_io.get(key) or []
        if (entry.get("major"), entry.get("minor")) == number
    }
    return DiskLimits(**rates)


def without_limits_of(resources: Mapping[str, Any], numbers: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Remove the rates that the machine enforces; nothing enforces the rest of ``blockIO``.

    :param resources: the ``linux.resources`` object of a specification.
    :param numbers: the major and minor numbers of the disks that the machine has.
    """
    known = set(numbers)
    if not known:
        return dict(resources)
    block_io = dict(resources.get("blockIO") or {})
    for key in _THROTTLES:
        rest = [
            entry
            for entry in block_io.get(key) or []
            if (entry.get("major"), entry.get("minor")) not in known
        ]
        block_io[key] = rest
    return {**resources, "blockIO": {key: value for key, value in block_io.items() if value} or None}


def _may_write(rules: Iterable[Mapping[str, Any]], number: tuple[int, int]) -> bool:
    """Read the access rules. The last match counts; without a match, access is allowed."""
    writable = True
    for rule in rules:
        fits = rule.get("type") in {"b", "a", None} and (
            (rule.get("major") in {None, -1, number[0]}) and (rule.get("minor") in {None, -1, number[1]})
        )
        if fits and rule.get("major") is not None:
            writable = bool(rule.get("allow")) and "w" in (rule.get("access") or "rwm")
    return writable

"""The PCI devices of the host that a container itself drives: those in its VFIO groups."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from shim.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_GROUP = re.compile("/dev/vfio/([0-9]+)")
_CONTAINER = "/dev/vfio/vfio"  # a program that uses a group also opens this
_BRIDGE_CLASS = "0x0604"  # base class 06, subclass 04 of the PCI Code and ID Assignment Specification


def is_vfio(path: str) -> bool:
    """Tell whether a path is a VFIO device node. The guest needs none, because its kernel drives the devices.

    :param path: the path in the container.
    """
    return path == _CONTAINER or _GROUP.fullmatch(path) is not None


def vfio_groups(linux: Mapping[str, Any]) -> list[int]:
    """Find the VFIO groups that a container names.

    :param linux: the ``linux`` object of its specification.
    :raises KeyError, TypeError, ValueError, AttributeError: if it is malformed.
    """
    paths = [device["path"] for device in linux.get("devices") or [] if device.get("type") == "c"]
    return [int(match[1]) for path in paths if (match := _GROUP.fullmatch(path))]


def devices_of(group: int, *, sysfs: Path) -> list[str]:
    """Find the devices of a group: a guest gets all of them or none (Documentation/driver-api/vfio.rst).

    :param group: its number.
    :param sysfs: where the kernel's sysfs is mounted.
    :returns: their PCI addresses; bridges stay with the host.
    :raises InvalidArgument: if the host has no such group.
    """
    members = sysfs / "kernel/iommu_groups" / str(group) / "devices"
    if not members.is_dir():
        raise InvalidArgument(
            f"spec: linux.devices: /dev/vfio/{group}: the host has no such IOMMU group; name one that it "
            "has, or boot it with intel_iommu=on or amd_iommu=on"
        )
    return sorted(
        member.name
        for member in members.iterdir()
        if not (member / "class").read_text(encoding="ascii").startswith(_BRIDGE_CLASS)
    )

"""Which devices a host can give away, and how they are described to QEMU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import HostPciDevice, vfio
from hypervisor.devices import Command, Description, Devices
from hypervisor.errors import HotplugError

if TYPE_CHECKING:
    from hypervisor.qmp import QmpSession
    from tests.unit.hypervisor.conftest import Peer


ADDRESS = "0000:3b:00.0"
DEVICE = HostPciDevice(id="gpu", address=ADDRESS)
MEMORY = 512 << 20


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A host that can give its device away."""
    (tmp_path / "kernel/iommu_groups/12").mkdir(parents=True)
    place = tmp_path / "bus/pci/devices" / ADDRESS
    place.mkdir(parents=True)
    (place / "driver").symlink_to("../../../../bus/pci/drivers/vfio-pci")
    return tmp_path


def test_a_device_bound_to_vfio_can_be_given_away(sysfs: Path) -> None:
    vfio.check(DEVICE, sysfs=sysfs)


def test_a_host_without_an_iommu_gets_the_remedy(sysfs: Path) -> None:
    (sysfs / "kernel/iommu_groups/12").rmdir()
    with pytest.raises(HotplugError, match=r"the host has no IOMMU .*; switch it on .* intel_iommu=on"):
        vfio.check(DEVICE, sysfs=sysfs)


def test_a_missing_device_is_an_error(sysfs: Path) -> None:
    with pytest.raises(HotplugError, match="has no such device"):
        vfio.check(HostPciDevice(id="gpu", address="0000:3b:00.1"), sysfs=sysfs)


@pytest.mark.parametrize("address", ["", "3b:00.0", "../../../etc", "0000:3b:00.0,x=y"])
def test_a_malformed_address_is_refused(sysfs: Path, address: str) -> None:
    with pytest.raises(HotplugError, match="not an address"):
        vfio.check(HostPciDevice(id="gpu", address=address), sysfs=sysfs)


@pytest.mark.parametrize("driver", ["nvme", "none"])
def test_a_device_with_another_driver_is_refused(sysfs: Path, driver: str) -> None:
    link = sysfs / "bus/pci/devices" / ADDRESS / "driver"
    link.unlink()
    if driver != "none":
        link.symlink_to(f"../../../../bus/pci/drivers/{driver}")
    with pytest.raises(HotplugError, match=f"its driver is {driver}, not vfio-pci; bind it"):
        vfio.check(DEVICE, sysfs=sysfs)


def test_a_device_is_described_with_its_own_port() -> None:
    assert vfio.describe(DEVICE, iommufd=False, memory_bytes=MEMORY) == Description(
        id="gpu",
        driver="vfio-pci",
        properties={"host": ADDRESS},
        backend=[],
        undo=[],
        needs_port=True,
        add_timeout_s=80.0,
    )


def test_a_device_is_described_with_iommufd() -> None:
    assert vfio.describe(DEVICE, iommufd=True, memory_bytes=MEMORY) == Description(
        id="gpu",
        driver="vfio-pci",
        properties={"host": ADDRESS, "iommufd": "gpu-iommufd"},
        backend=[Command("object-add", {"qom-type": "iommufd", "id": "gpu-iommufd"})],
        undo=[Command("object-del", {"id": "gpu-iommufd"})],
        needs_port=True,
        add_timeout_s=80.0,
    )


async def test_a_machine_without_ports_is_refused_with_the_key_to_configure(
    connected: tuple[QmpSession, Peer],
) -> None:
    session, _peer = connected
    devices = Devices(session, buses=["bus1"], ports=[])
    with pytest.raises(HotplugError, match=r"all 0 PCIe root ports .*; raise root_ports"):
        await devices.plug(vfio.describe(DEVICE, iommufd=False, memory_bytes=MEMORY))


@pytest.mark.parametrize(("gib", "limit_s"), [(0, 60), (1, 100), (16, 700), (1024, 1200)])
def test_more_memory_may_take_longer_to_pin_up_to_a_limit(gib: int, limit_s: int) -> None:
    assert vfio.pinning_timeout_s(gib << 30) == limit_s


def test_a_node_is_allowed_by_its_number(tmp_path: Path) -> None:
    assert vfio.numbers([Path("/dev/null"), Path("/dev/zero"), tmp_path / "gone"]) == [(1, 3), (1, 5)]

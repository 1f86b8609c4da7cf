"""Devices are found by their PCI path as soon as the kernel has made them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest.agent import uevent
from guest.agent.errors import AgentError, InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

BRIDGE = "0000:00:02.0"


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand for a root bus with one bridge, which leads to bus 1."""
    (tmp_path / BRIDGE / "pci_bus" / "0000:01").mkdir(parents=True)
    monkeypatch.setattr(uevent, "_PCI_ROOT", str(tmp_path))
    return tmp_path


def test_a_path_leads_through_bridges(bus: Path) -> None:
    device = bus / BRIDGE / "0000:01:1e.0"
    device.mkdir()
    assert uevent.pci_directory("02/1e") == str(device)
    assert uevent.pci_directory("02") == str(bus / BRIDGE)


@pytest.mark.parametrize("absent", ["02/1e", "03", "03/00", "02.1", "02/00/00"])
def test_a_path_to_a_missing_device_is_accepted(bus: Path, absent: str) -> None:
    assert uevent.pci_directory(absent) is None
    assert uevent.virtio_children(absent, "block") == []


@pytest.mark.parametrize("path", ["", "20", "02/", "/02", "vda", "02.8", "02.", "+2", "../02"])
def test_a_malformed_pci_path_is_refused(bus: Path, path: str) -> None:
    with pytest.raises(InvalidArgument, match="not a PCI path"):
        uevent.pci_directory(path)


def test_a_drivers_children_have_names(bus: Path) -> None:
    device = bus / BRIDGE / "0000:01:00.0"
    (device / "virtio7" / "block" / "vdb").mkdir(parents=True)
    (device / "power").mkdir()
    assert uevent.virtio_children("02/00", "block") == ["vdb"]
    assert uevent.virtio_children("02/00", "net") == []


def test_waiting_for_a_device_that_never_appears_ends() -> None:
    with pytest.raises(AgentError, match=r"disk: 02/00: it did not appear in 0 s"):
        uevent.wait_for(lambda: None, what="disk: 02/00", timeout_s=0.01)


def test_a_present_device_is_found_without_waiting() -> None:
    assert uevent.wait_for(lambda: "/dev/vda", what="disk", timeout_s=0) == "/dev/vda"

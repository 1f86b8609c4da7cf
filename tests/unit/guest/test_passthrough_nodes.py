"""The nodes below a PCI device, and their entries in a container's specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest.agent import devices, passthrough

if TYPE_CHECKING:
    from pathlib import Path

DENY = {"allow": False, "access": "rwm"}
BLOCK = {"path": "/dev/nvme0n1", "type": "b", "major": 259, "minor": 0, "fileMode": 0o660, "uid": 0, "gid": 0}


def node(place: Path, number: str, *, subsystem: str, name: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "dev").write_text(f"{number}\n")
    (place / "uevent").write_text(f"MAJOR={number.partition(':')[0]}\nDEVNAME={name}\n")
    (place / "subsystem").symlink_to(f"../../../../class/{subsystem}")


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A disk's controller, its disk with a partition, and a device that disappears during the search."""
    controller = tmp_path / "nvme/nvme0"
    node(controller, "242:0", subsystem="nvme", name="nvme0")
    node(controller / "nvme0n1", "259:0", subsystem="block", name="nvme0n1")
    node(controller / "nvme0n1/nvme0n1p1", "259:1", subsystem="block", name="nvme0n1p1")
    (controller / "gone").mkdir()
    (controller / "gone/dev").touch()
    return tmp_path


def test_every_node_below_a_device_is_found_with_its_kind_and_number(device: Path) -> None:
    found = [
        (each["path"], each["type"], each["major"], each["minor"]) for each in passthrough._below(str(device))
    ]
    assert found == [
        ("/dev/nvme0", "c", 242, 0),
        ("/dev/nvme0n1", "b", 259, 0),
        ("/dev/nvme0n1p1", "b", 259, 1),
    ]


def test_a_node_in_a_subdirectory_keeps_its_whole_path(tmp_path: Path) -> None:
    node(tmp_path / "drm/card0", "226:0", subsystem="drm", name="dri/card0")
    assert [each["path"] for each in passthrough._below(str(tmp_path))] == ["/dev/dri/card0"]


def test_a_container_may_use_the_nodes_it_gets() -> None:
    linux = {"devices": [], "resources": {"devices": [DENY]}}
    devices.add(linux, [BLOCK])
    allowed = {"allow": True, "access": "rwm", "type": "b", "major": 259, "minor": 0}
    assert linux == {"devices": [BLOCK], "resources": {"devices": [DENY, allowed]}}


def test_a_container_that_may_use_all_devices_gets_no_rule() -> None:
    linux: dict[str, object] = {}
    devices.add(linux, [BLOCK])
    assert linux == {"devices": [BLOCK], "resources": {"devices": []}}


def test_a_specified_mount_at_a_nodes_path_stays() -> None:
    own = {"path": "/dev/nvme0n1", "type": "c", "major": 1, "minor": 3}
    linux = {"devices": [own]}
    devices.add(linux, [BLOCK])
    assert linux == {"devices": [own]}

"""A guest mounts some root file systems from a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proto.containerd.types_pb2 import Mount
from shim.agent.oci_disks import RootDisk, root_disk

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    return path


def test_a_file_with_a_file_system_becomes_a_disk(image: Path) -> None:
    mount = Mount(type="ext4", source=str(image), options=["ro", "loop"])
    assert root_disk([mount]) == RootDisk(path=image, fstype="ext4", options=("ro",))


def test_a_read_only_file_system_becomes_a_read_only_disk(image: Path) -> None:
    found = root_disk([Mount(type="xfs", source=str(image), options=["ro"])])
    assert found is not None
    assert found.read_only


@pytest.mark.parametrize(
    "mount",
    [
        Mount(type="overlay", source="overlay", options=["lowerdir=/a:/b"]),
        Mount(type="bind", source="/tmp", options=["rbind"]),
        Mount(type="ext4", source="/nonexistent"),
        Mount(type="ext4", source="/tmp"),
        Mount(type="ext4", source="/a\0b"),
    ],
)
def test_other_root_file_systems_are_mounted_on_the_host(mount: Mount) -> None:
    assert root_disk([mount]) is None


def test_a_root_file_system_of_several_mounts_is_mounted_on_the_host(image: Path) -> None:
    mount = Mount(type="ext4", source=str(image))
    assert root_disk([mount, mount]) is None
    assert root_disk([]) is None

"""A container's VFIO groups are resolved to the host's PCI devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shim.agent.oci import Translation, translate
from shim.agent.oci_vfio import devices_of, vfio_groups
from shim.errors import InvalidArgument
from shim.sandbox.inheritance import Inheritance

if TYPE_CHECKING:
    from pathlib import Path


def node(path: str, kind: str = "c") -> dict[str, object]:
    return {"path": path, "type": kind, "major": 244, "minor": 0}


def specification(*devices: dict[str, object], **resources: object) -> dict[str, object]:
    return {
        "process": {"args": ["sh"], "cwd": "/"},
        "linux": {"devices": list(devices), "resources": resources},
    }


def translated(spec: dict[str, object]) -> Translation:
    return translate(
        spec,
        container_id="c",
        sandbox_id="pod",
        terminal=False,
        seccomp=False,
        inheritance=Inheritance({}, oom_score_adj=0),
    )


def test_groups_are_found_by_their_nodes() -> None:
    nodes = [node("/dev/vfio/vfio"), node("/dev/vfio/12"), node("/dev/vfio/7"), node("/dev/vfio/3", "b")]
    assert vfio_groups({"devices": nodes}) == [12, 7]


def test_vfio_nodes_are_not_sent_and_their_groups_go_to_the_machine() -> None:
    spec = specification(node("/dev/vfio/vfio"), node("/dev/vfio/12"))
    translation = translated(spec)
    assert translation.vfio_groups == (12,)
    assert list(translation.spec.Linux.Devices) == []


def test_a_privileged_container_that_lists_every_device_gets_no_group() -> None:
    spec = specification(node("/dev/vfio/12"), devices=[{"allow": True, "access": "rwm"}])
    assert translated(spec).vfio_groups == ()


def test_vfio_without_a_group_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="/dev/vfio/devices/vfio0"):
        translated(specification(node("/dev/vfio/devices/vfio0")))


def test_a_group_means_all_its_devices_except_bridges(tmp_path: Path) -> None:
    for address, kind in {
        "0000:3b:00.1": "0x040300",
        "0000:3b:00.0": "0x030000",
        "0000:3a:00.0": "0x060400",
    }.items():
        device = tmp_path / "kernel/iommu_groups/12/devices" / address
        device.mkdir(parents=True)
        (device / "class").write_text(f"{kind}\n")
    assert devices_of(12, sysfs=tmp_path) == ["0000:3b:00.0", "0000:3b:00.1"]


def test_a_group_that_the_host_lacks_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match=r"/dev/vfio/12: the host has no such IOMMU group; .*intel_iommu=on"
    ):
        devices_of(12, sysfs=tmp_path)

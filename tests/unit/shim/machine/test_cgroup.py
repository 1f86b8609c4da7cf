"""The host cgroup that accounts for a sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.host.ledger import Ledger
from shim.machine import cgroup
from shim.machine.cgroup import HostCgroup, counting_roots, missing_controllers, normal_path

if TYPE_CHECKING:
    from collections.abc import Iterator

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
BOUND = (320 << 20) + cgroup.OVERHEAD_BYTES
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("/default/c1", "default/c1"),
        ("default/c1", "default/c1"),
        ("/a/../../../b", "b"),
        ("", ""),
        ("/", ""),
        ("system.slice:cri-containerd:c1", "system.slice/cri-containerd-c1.scope"),
        (
            "kubepods-burstable-pod1.slice:cri-containerd:c1",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope",
        ),
        ("-.slice::c1", "c1.scope"),
    ],
)
def test_the_cgroup_is_given_by_a_path_or_a_slice(wanted: str, path: str) -> None:
    assert normal_path(wanted) == path


def test_cgroup_version_1_is_used_where_it_has_controllers() -> None:
    assert counting_roots(HYBRID) == [Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup/memory")]


def test_cgroup_version_2_is_used_where_it_is_alone() -> None:
    assert counting_roots(UNIFIED) == [Path("/sys/fs/cgroup")]


@pytest.mark.parametrize("limit", ["memory.max", "memory.limit_in_bytes"], ids=["version 2", "version 1"])
def test_memory_is_limited_to_the_guests_and_an_overhead(tmp_path: Path, limit: str) -> None:
    (tmp_path / limit).touch()
    HostCgroup([tmp_path]).limit_memory(256 << 20)
    assert int((tmp_path / limit).read_text()) == BOUND


@pytest.mark.parametrize(
    ("names", "bounds"),
    [
        (("memory.max", "memory.swap.max"), (BOUND, BOUND)),
        (("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), (BOUND, 2 * BOUND)),
    ],
    ids=["version 2", "version 1"],
)
def test_as_much_swap_as_memory_may_be_used(
    tmp_path: Path, names: tuple[str, str], bounds: tuple[int, int]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    HostCgroup([tmp_path]).limit_memory(256 << 20)
    assert tuple(int((tmp_path / name).read_text()) for name in names) == bounds


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a hierarchy of version 2 that a directory stands for."""
    mounts = tmp_path / "mountinfo"
    root = tmp_path / "cgroup"
    root.mkdir()
    mounts.write_text(UNIFIED.replace("/sys/fs/cgroup", str(root)))
    monkeypatch.setattr(cgroup, "_MOUNTINFO", mounts)
    return root


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(str(tmp_path), create=True)
    yield ledger
    ledger.close()


@pytest.mark.parametrize(
    ("wanted", "there", "made"),
    [
        ("", "", "hako-1"),
        ("/pod/1", "", "pod/1"),
        ("/pod/1", "pod", "pod/1"),
        ("/pod/1", "pod/1", "pod/1/hako-1"),
        ("/pod/1", "pod/1/hako-1", "pod/1/hako-1"),
    ],
    ids=["none is named", "new", "new below one", "exists", "left behind"],
)
def test_limits_are_set_in_a_cgroup_that_the_sandbox_has_alone(
    hierarchy: Path, ledger: Ledger, wanted: str, there: str, made: str
) -> None:
    (hierarchy / there).mkdir(parents=True, exist_ok=True)
    HostCgroup.make(wanted, name="hako-1", ledger=ledger).add(1)
    assert [path.parent for path in hierarchy.rglob("cgroup.procs")] == [hierarchy / made]
    assert [entry.name for entry in ledger.entries() if entry.kind == "cgroup"] == [str(hierarchy / made)]


def test_a_process_that_cannot_be_limited_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").mkdir()
    bounded = HostCgroup([tmp_path])
    bounded.add(1)
    assert bounded.problem == f"{tmp_path}: process 1: Is a directory"


def test_a_host_without_a_memory_controller_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bounded = HostCgroup([tmp_path])
    bounded.limit_memory(1)
    bounded.limit_memory(2)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"cgroup: {tmp_path}: no memory controller there")


def test_missing_controllers_of_version_1_are_listed() -> None:
    assert missing_controllers(HYBRID) == ["pids"]


@pytest.mark.parametrize(("offered", "missing"), [("cpu memory pids\n", []), ("cpu\n", ["memory", "pids"])])
def test_missing_controllers_of_version_2_are_listed(
    tmp_path: Path, offered: str, missing: list[str]
) -> None:
    (tmp_path / "cgroup.controllers").write_text(offered)
    assert missing_controllers(UNIFIED.replace("/sys/fs/cgroup", str(tmp_path))) == missing


def test_version_1_denies_all_devices_before_it_allows_some(tmp_path: Path) -> None:
    for name in ("devices.allow", "devices.deny"):
        (tmp_path / name).touch()
    bounded = HostCgroup([tmp_path])
    bounded.limit_devices([(1, 3)])
    assert (tmp_path / "devices.deny").read_text() == "a"
    assert (tmp_path / "devices.allow").read_text() == "c 1:3 rw"
    assert bounded.problem == ""


def test_a_device_that_is_given_later_is_allowed_then(tmp_path: Path) -> None:
    for name in ("devices.allow", "devices.deny"):
        (tmp_path / name).touch()
    bounded = HostCgroup([tmp_path])
    bounded.limit_devices([(1, 3)])
    (tmp_path / "devices.deny").write_text("")
    bounded.allow_devices([(1, 3), (237, 4)])
    assert (tmp_path / "devices.deny").read_text() == ""
    assert (tmp_path / "devices.allow").read_text() == "c 237:4 rw"


def test_a_device_is_not_allowed_where_any_is(tmp_path: Path) -> None:
    for name in ("devices.allow", "devices.deny"):
        (tmp_path / name).touch()
    HostCgroup([tmp_path]).allow_devices([(237, 4)])
    assert (tmp_path / "devices.deny").read_text() == (tmp_path / "devices.allow").read_text() == ""


def test_a_host_without_a_devices_controller_is_reported(tmp_path: Path) -> None:
    bounded = HostCgroup([tmp_path])
    bounded.limit_devices([])
    assert bounded.problem == f"{tmp_path}: the host has no devices controller there"

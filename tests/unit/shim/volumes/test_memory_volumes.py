"""The guest holds a pod's volumes in memory, and they add to the machine's memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from shim.agent.oci_mount_kinds import OfTheGuest
from shim.errors import InvalidArgument, Unimplemented
from shim.host.volume_source import GuestWritable
from shim.machine.limits import Limits, with_memory
from shim.machine.sizing import MIB
from shim.volumes import host_tmpfs
from shim.volumes.host_tmpfs import TmpfsPlace
from shim.volumes.memory_volumes import MemoryVolumes

if TYPE_CHECKING:
    from shim.agent.client import Agent

HOST_MIB = 8192
SIZE_MIB = 256


@dataclass
class User:
    id: str
    limits: Limits


@dataclass
class Guest:
    """An agent that records its requests."""

    refuses: str = ""
    mounted: list[str] = field(default_factory=list)
    written: dict[str, bytes] = field(default_factory=dict)

    @property
    def files(self) -> Guest:
        return self

    async def mount_tmpfs(self, mount_point: str, *, options: list[str]) -> None:
        if self.refuses == "mount":
            raise Unimplemented("UpdateEphemeralMounts")
        assert f"size={SIZE_MIB * MIB}" in options
        self.mounted.append(mount_point)

    async def has_file(self, path: str) -> bool:
        return path in self.written

    async def copy_file(self, target: str, *, status: os.stat_result, data: bytes) -> None:
        if self.refuses == "copy":
            raise InvalidArgument("CopyFile")
        assert status.st_mode
        self.written[target] = data


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory that stands for a tmpfs that the kubelet has mounted."""
    path = tmp_path / "kubernetes.io~empty-dir" / "cache"
    path.mkdir(parents=True)

    def find(descriptor: int) -> TmpfsPlace | None:
        below = os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), path)
        return None if below.startswith("..") else TmpfsPlace(path, "" if below == "." else below)

    monkeypatch.setattr(host_tmpfs, "find", find)
    monkeypatch.setattr(host_tmpfs, "size_of", lambda _: SIZE_MIB * MIB)
    monkeypatch.setattr(host_tmpfs, "options_of", lambda _: [f"size={SIZE_MIB * MIB}"])
    return path


@pytest.fixture
def volumes() -> MemoryVolumes:
    return MemoryVolumes(GuestWritable(), host_bytes=HOST_MIB * MIB)


async def given(
    volumes: MemoryVolumes, source: Path, guest: Guest, *, container_id: str = "app", limit_mib: int = 0
) -> dict[str, Any]:
    entry = {"destination": "/cache", "type": "bind", "source": str(source), "options": ["rbind", "ro"]}
    user = User(container_id, Limits(memory_bytes=limit_mib * MIB))
    spec = await volumes.serve({"mounts": [entry]}, user=user, agent=cast("Agent", guest))
    [found] = spec["mounts"]
    return cast("dict[str, Any]", found)


async def test_a_volume_is_mounted_once_in_the_guest_and_keeps_its_options(
    volumes: MemoryVolumes, volume: Path
) -> None:
    guest = Guest()
    first, second = await given(volumes, volume, guest), await given(volumes, volume, guest)
    assert isinstance(first, OfTheGuest)
    assert not first.part_of
    assert first == second
    assert guest.mounted == [first["source"]]
    assert first["options"] == ["rbind", "ro"]


async def test_the_kubelets_files_are_copied_once(volumes: MemoryVolumes, volume: Path) -> None:
    (volume / "directory").mkdir()
    (volume / "directory" / "file").write_text("text")
    (volume / "link").symlink_to("directory/file")
    guest = Guest()
    entry = await given(volumes, volume, guest)
    root = entry["source"]
    assert list(guest.written.items()) == [
        (f"{root}/directory", b""),
        (f"{root}/link", b"directory/file"),
        (f"{root}/directory/file", b"text"),
    ]
    (volume / "later").touch()
    await given(volumes, volume, guest)
    assert f"{root}/later" not in guest.written


async def test_a_missing_subpath_is_made_with_its_parent_directories(
    volumes: MemoryVolumes, volume: Path
) -> None:
    guest = Guest()
    root = (await given(volumes, volume, guest))["source"]
    (volume / "a" / "b").mkdir(parents=True)
    guest.written[f"{root}/a"] = b"a container's"
    part, again = await given(volumes, volume / "a" / "b", guest), await given(volumes, volume / "a/b", guest)
    assert isinstance(part, OfTheGuest)
    assert part.part_of == f"{root}/a/b"
    assert part["source"] == again["source"] != root
    assert guest.written == {f"{root}/a": b"a container's", f"{root}/a/b": b""}


async def test_other_volumes_are_left_alone(volumes: MemoryVolumes, tmp_path: Path, volume: Path) -> None:
    beside = volume.parent / "on-disk"
    beside.mkdir()
    for source in (beside, tmp_path, volume / "absent"):
        assert not isinstance(await given(volumes, source, Guest()), OfTheGuest)


@pytest.mark.parametrize("why", ["fifo", "many", "large", "mount", "copy"])
async def test_a_volume_that_the_guest_cannot_hold_stays_shared(
    volumes: MemoryVolumes, volume: Path, why: str
) -> None:
    match why:
        case "fifo":
            os.mkfifo(volume / "fifo")
        case "many":
            for number in range(300):
                (volume / str(number)).touch()
        case "large":
            with (volume / "large").open("wb") as file:
                file.truncate(17 * MIB)
        case _:
            (volume / "file").touch()
    assert not isinstance(await given(volumes, volume, Guest(refuses=why)), OfTheGuest)
    empty(volume)
    assert not isinstance(await given(volumes, volume, Guest()), OfTheGuest)


def empty(volume: Path) -> None:
    for path in volume.iterdir():
        path.unlink()


def live(**limits_mib: int) -> dict[str, Limits]:
    return {name: Limits(memory_bytes=limit * MIB) for name, limit in limits_mib.items()}


async def needed_mib(volumes: MemoryVolumes, **limits_mib: int) -> int:
    return volumes.needed_bytes(live(**limits_mib)) // MIB


async def test_a_volume_adds_memory_if_a_container_has_no_limit(volumes: MemoryVolumes, volume: Path) -> None:
    assert await needed_mib(volumes) == 0
    await given(volumes, volume, Guest(), container_id="app")
    assert await needed_mib(volumes, app=0, other=64) == SIZE_MIB


async def test_a_volume_counts_against_the_limit_of_a_container_that_has_one(
    volumes: MemoryVolumes, volume: Path
) -> None:
    await given(volumes, volume, Guest(), container_id="app", limit_mib=512)
    assert await needed_mib(volumes, app=512) == 0


@pytest.mark.parametrize(
    ("init", "app", "more"),
    [(512, 128, SIZE_MIB), (512, 400, 112), (100, 50, 50), (128, 512, 0)],
    ids=["the volume", "the pod's memory", "the limit", "enough"],
)
async def test_files_that_a_container_leaves_behind_still_count(
    volumes: MemoryVolumes, volume: Path, init: int, app: int, more: int
) -> None:
    guest = Guest()
    await given(volumes, volume, guest, container_id="init", limit_mib=init)
    assert await needed_mib(volumes, init=init) == 0
    await given(volumes, volume, guest, container_id="app", limit_mib=app)
    assert await needed_mib(volumes, app=app) == more
    assert await needed_mib(volumes, app=app) == more


async def test_a_size_that_only_the_host_limits_does_not_count(volume: Path) -> None:
    volumes = MemoryVolumes(GuestWritable(), host_bytes=SIZE_MIB * MIB)
    await given(volumes, volume, Guest(), container_id="app")
    assert await needed_mib(volumes, app=0) == 0


def test_memory_outside_containers_changes_no_other_limit() -> None:
    limits = Limits(quota_us=1000, memory_bytes=MIB, cpuset=frozenset({1}))
    assert with_memory([limits], 0) == [limits]
    [changed, other] = with_memory([limits, limits], MIB)
    assert (changed.memory_bytes, changed.cpuset, other) == (2 * MIB, limits.cpuset, limits)
    assert with_memory([], MIB) == [Limits(memory_bytes=MIB)]

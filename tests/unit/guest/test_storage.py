"""Volumes are given to a group, as fsGroup of Kubernetes asks."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, cast

import pytest

from guest.agent import kernel, storage
from proto.kata import agent_pb2, types_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from guest.agent.wire import Message

ALWAYS = types_pb2.FSGroupChangePolicy.Always
ON_MISMATCH = types_pb2.FSGroupChangePolicy.OnRootMismatch


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Make a volume that only this user may read, with a program, a file and a link that leads out."""
    outside = tmp_path / "outside"
    outside.touch(mode=0o600)
    root = tmp_path / "volume"
    (root / "deep").mkdir(parents=True)
    root.chmod(0o700)
    (root / "deep" / "program").touch(mode=0o700)
    (root / "file").touch(mode=0o400)
    (root / "link").symlink_to(outside)
    return root


def give(volume: Path, policy: types_pb2.FSGroupChangePolicy) -> None:
    group = agent_pb2.FSGroup(group_id=os.getgid(), group_change_policy=policy)
    storage.add(cast("Message", agent_pb2.Storage(driver="local", mount_point=str(volume), fs_group=group)))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_group_may_use_everything_in_its_volume(volume: Path) -> None:
    give(volume, ALWAYS)
    assert mode(volume) == 0o2770
    assert mode(volume / "deep") & 0o2070 == 0o2070
    assert mode(volume / "deep" / "program") == 0o770
    assert mode(volume / "file") == 0o460
    assert mode(volume.parent / "outside") == 0o600


def test_a_volume_that_already_belongs_to_the_group_is_left_alone(volume: Path) -> None:
    volume.chmod(0o2770)
    give(volume, ON_MISMATCH)
    assert mode(volume / "file") == 0o400
    give(volume, ALWAYS)
    assert mode(volume / "file") == 0o460


@pytest.mark.parametrize("late", [0, 1], ids=["there", "plugged a moment later"])
def test_a_share_is_mounted_as_soon_as_its_device_appears(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: int
) -> None:
    calls: list[tuple[str, str, str]] = []

    def mount(source: str, target: str, *, fstype: str, **_options: object) -> None:
        calls.append((source, target, fstype))
        if len(calls) <= late:
            raise OSError(errno.EINVAL, "no such tag")

    monkeypatch.setattr(kernel, "mount", mount)
    share = agent_pb2.Storage(
        driver="virtio-fs", source="kataShared", fstype="virtiofs", mount_point=f"{tmp_path}"
    )
    storage._make(cast("Message", share))
    assert calls == [("kataShared", str(tmp_path), "virtiofs")] * (1 + late)

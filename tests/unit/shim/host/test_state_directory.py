"""A sandbox's lock, and files that are written atomically."""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from shim.host import state_directory
from shim.refusal import Refusal
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from pathlib import Path


def test_locking_creates_the_directory(tmp_path: Path) -> None:
    os.close(state_directory.lock(str(tmp_path / "state" / "box")))
    assert stat.S_IMODE((tmp_path / "state" / "box").stat().st_mode) == 0o700


def test_locking_without_creating_fails_if_the_directory_is_missing(tmp_path: Path) -> None:
    assert state_directory.lock_existing(str(tmp_path / "none")) is None


def test_a_held_lock_is_not_waited_for_unless_asked(tmp_path: Path) -> None:
    held = state_directory.lock(str(tmp_path))
    assert state_directory.lock_existing(str(tmp_path), wait=False) is None
    os.close(held)
    again = state_directory.lock_existing(str(tmp_path), wait=False)
    assert again is not None
    os.close(again)


def test_the_wait_for_a_lock_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_directory, "LOCK_TIMEOUT_S", 0.02)
    held = state_directory.lock(str(tmp_path))
    with pytest.raises(Refusal, match="another start or delete has held it"):
        state_directory.lock(str(tmp_path))
    os.close(held)


def test_a_waiter_locks_the_directory_that_replaced_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "box"
    held = state_directory.lock(str(path))
    taken: list[int] = []
    waiting = threading.Thread(target=lambda: taken.append(state_directory.lock(str(path))))
    waiting.start()
    path.rmdir()
    os.close(held)
    waiting.join(timeout=WITHIN_S)
    assert os.path.samestat(os.fstat(taken[0]), path.stat())
    os.close(taken[0])


def test_a_file_is_written_atomically_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    state_directory.write_atomically(str(path), "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_bundle_points_to_its_sandbox(tmp_path: Path) -> None:
    assert state_directory.pointed_to(str(tmp_path)) is None
    for target in ("/run/hako/a", "/run/hako/b"):
        state_directory.point_to(target, bundle=str(tmp_path))
        assert state_directory.pointed_to(str(tmp_path)) == target

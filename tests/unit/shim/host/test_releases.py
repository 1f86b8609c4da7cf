"""A release is removed only if no process runs from it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from shim.host import releases

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NEW = "0.2.0-b"
OLD = "0.1.0-a"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (OLD, NEW, "package"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to("/usr/bin/sleep")
    (tmp_path / "current").symlink_to(NEW)
    return tmp_path


@pytest.fixture
def runs_from_old(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = root / OLD / "bin" / "python"
    with subprocess.Popen([program, "60"]) as process:
        while not command_line(process.pid).startswith(bytes(program)):
            os.sched_yield()
        yield process
        process.kill()


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_an_unused_release_is_removed(root: Path) -> None:
    assert releases.prune(str(root), wait_s=0) == [OLD]

    assert names(root) == {NEW, "package", "current"}


def test_a_release_in_use_stays(root: Path, runs_from_old: subprocess.Popen[bytes]) -> None:
    assert releases.prune(str(root), wait_s=0) == []

    runs_from_old.kill()
    runs_from_old.wait()
    assert releases.prune(str(root), wait_s=0) == [OLD]


def test_nothing_is_removed_during_a_start_from_an_old_release(root: Path) -> None:
    shim = root / "current/bin/containerd-shim-hako-v2"
    program = f"import os; os.execv('/usr/bin/tail', ['python3', '-F', '{shim}'])"
    with subprocess.Popen(["/usr/bin/python3", "-c", program], stderr=subprocess.DEVNULL) as start:
        while not command_line(start.pid).endswith(b"-F\0" + bytes(shim) + b"\0"):
            os.sched_yield()
        later = time.time() + 60
        os.utime(root / "current", (later, later), follow_symlinks=False)
        assert releases.prune(str(root), wait_s=0) == []
        start.kill()
    assert releases.prune(str(root), wait_s=5) == [OLD]


def command_line(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123 - a file of another process
        return file.read()


def test_a_source_tree_has_no_releases() -> None:
    assert releases.root() is None


def test_the_zygotes_of_other_releases_end(root: Path) -> None:
    program = root / OLD / "bin" / "zygote"
    program.symlink_to("/usr/bin/tail")
    with subprocess.Popen([program, "-f", "/dev/null", "--", "-zygote"], stderr=subprocess.DEVNULL) as zygote:
        while b"-zygote" not in command_line(zygote.pid).split(b"\0"):
            os.sched_yield()
        releases.retire_zygotes(str(root))
        assert zygote.wait(5) == -15


def test_only_the_sockets_of_dead_zygotes_are_removed(tmp_path: Path) -> None:
    for name in ("1", "1.lock", "2", "2.lock"):
        (tmp_path / name).touch()
    with (tmp_path / "2.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        releases.remove_dead_sockets(str(tmp_path))

        assert names(tmp_path) == {"2", "2.lock"}

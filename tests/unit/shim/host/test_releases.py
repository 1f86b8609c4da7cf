"""A release is removed only if no process runs from it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from scripts.document import ROOT
from shim import zygote_protocol
from shim.host import releases
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NEW = "0.2.0-b"
OLD = "0.1.0-a"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "hako"
    for name in (OLD, NEW, "package"):
        (found / name / "bin").mkdir(parents=True)
        (found / name / "bin" / "python").symlink_to("/usr/bin/sleep")
    (found / "current").symlink_to(NEW)
    return found


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


@pytest.fixture
def own(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have this process run from the old release."""
    (root / OLD / "packages").mkdir()
    (root / OLD / "lib").mkdir()
    (root / OLD / "lib/site-packages").symlink_to("../packages")
    module = root / OLD / "lib/site-packages/shim/host/releases.py"
    monkeypatch.setattr(releases, "__file__", str(module))
    monkeypatch.setattr(zygote_protocol, "ZYGOTE_DIRECTORY", str(root.parent / "run/zygote"))
    (root.parent / "run/zygote").mkdir(parents=True)
    return root


def test_the_last_process_of_an_old_release_takes_it_along(own: Path) -> None:
    releases.leave()

    assert names(own) == {NEW, "package", "current"}
    assert (own.parent / "run").exists()


@pytest.mark.parametrize(("lock_s", "waits"), [(WITHIN_S, True), (0.0, False)])
def test_a_process_that_ends_waits_for_another_that_removes_releases(
    own: Path, *, lock_s: float, waits: bool
) -> None:
    held = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_EX)
    is_free = threading.Event()

    def let_go() -> None:
        is_free.set()
        os.close(held)

    timer = threading.Timer(0.2, let_go)
    timer.start()
    releases.leave(lock_s=lock_s)
    assert is_free.is_set() == waits
    timer.join()


def test_a_process_that_is_not_the_last_leaves_its_release(
    own: Path, runs_from_old: subprocess.Popen[bytes]
) -> None:
    assert runs_from_old.poll() is None
    releases.leave()

    assert names(own) == {OLD, NEW, "package", "current"}


def test_the_last_of_a_removed_package_leaves_nothing(own: Path) -> None:
    for name in (NEW, "package"):
        shutil.rmtree(own / name)
    (own / "current").unlink()

    releases.leave()

    assert not own.exists()
    assert not (own.parent / "run").exists()


@pytest.fixture
def purged(own: Path) -> Path:
    """Purge the package while the old release runs; return a directory that the last process removes."""
    for name in (NEW, "package"):
        shutil.rmtree(own / name)
    (own / "current").unlink()
    logs = own.parent / "log"
    logs.mkdir()
    (logs / "box.timeline").touch()
    (own / "purged").write_text(f"{logs}\n{own.parent}/never-there\n", encoding="utf-8")
    return logs


def test_the_last_of_a_purged_package_removes_what_the_purge_left_to_it(own: Path, purged: Path) -> None:
    releases.leave()

    assert not own.exists()
    assert not purged.exists()


def test_what_a_purge_left_stays_while_a_process_may_need_it(
    own: Path, purged: Path, runs_from_old: subprocess.Popen[bytes]
) -> None:
    assert runs_from_old.poll() is None
    releases.leave()

    assert names(own) == {OLD, "purged"}
    assert (purged / "box.timeline").exists()


def test_a_purge_counts_no_more_once_the_package_is_installed_again(own: Path, purged: Path) -> None:
    (own / NEW).mkdir()
    (own / "current").symlink_to(NEW)

    releases.leave()

    assert names(own) == {NEW, "current", "purged"}
    assert purged.exists()


def test_what_sandboxes_share_stays_while_there_is_one(own: Path) -> None:
    (own.parent / "run/0123").mkdir()
    (own.parent / "run/0123/sandbox.json").touch()

    releases.remove_shared()

    assert (own.parent / "run/zygote").exists()


def test_of_two_that_end_at_once_the_second_takes_the_release_along(own: Path) -> None:
    # Each prunes as the old release's process does, and stays for a moment longer.
    program = (
        f"import os; from shim.host import releases; releases.__file__ = {releases.__file__!r}\n"
        f"releases._LOCK_S = {WITHIN_S}\n"
        "input(); releases.leave(); os._exit(0)"
    )
    python = own / OLD / "bin/python"
    python.unlink()
    python.symlink_to(sys.executable)
    argv = [str(python), "-c", program]
    environment = {"PYTHONPATH": ":".join([str(ROOT), *sys.path])}
    two = [
        subprocess.Popen(argv, executable=sys.executable, stdin=subprocess.PIPE, env=environment)
        for _ in "12"
    ]
    for each in two:
        while not command_line(each.pid).startswith(bytes(python)):
            os.sched_yield()
    for each in two:
        assert each.stdin is not None
        each.stdin.write(b"\n")
        each.stdin.close()
    assert [each.wait(WITHIN_S) for each in two] == [0, 0]

    assert OLD not in names(own)


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
    assert releases.prune(str(root), wait_s=WITHIN_S) == [OLD]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root directory")
def test_only_a_program_that_is_gone_may_be_of_a_removed_release(root: Path, tmp_path: Path) -> None:
    program, elsewhere = tmp_path / "bin/containerd-shim-hako-v2", tmp_path / "elsewhere"
    there = elsewhere / program.relative_to("/")
    for path in (program, there):
        path.parent.mkdir(parents=True)
        path.write_text("import os, sys; os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, program, elsewhere], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        program.unlink()
        later = time.time() + 60
        os.utime(root / "current", (later, later), follow_symlinks=False)
        hidden = there.rename(there.with_suffix(".old"))
        assert releases.prune(str(root), wait_s=0) == []
        hidden.rename(there)
        assert releases.prune(str(root), wait_s=0) == [OLD]
        other.kill()


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
        assert zygote.wait(WITHIN_S) == -15


def test_only_the_sockets_of_dead_zygotes_are_removed(tmp_path: Path) -> None:
    for name in ("1", "1.lock", "2", "2.lock"):
        (tmp_path / name).touch()
    with (tmp_path / "2.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        releases.remove_dead_sockets(str(tmp_path))

        assert names(tmp_path) == {"2", "2.lock"}

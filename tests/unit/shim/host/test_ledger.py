"""The ledger: everything in it is undone, and nothing else is touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from shim.host import file_lock, host_process
from shim.host import ledger as ledger_module
from shim.host.host_process import HostProcess
from shim.host.ledger import Ledger
from tests.waiting import WITHIN_S

STATE_S = 0.5
"""How long containerd may wait for a state: a slow line in the ledger blocks the event loop."""

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture
def ledger(state: Path) -> Iterator[Ledger]:
    ledger = Ledger(str(state), create=True)
    yield ledger
    ledger.close()


def undo(ledger: Ledger) -> list[str]:
    return ledger.undo_all(deadline_s=WITHIN_S)


def test_undoing_removes_files_directories_and_the_state_directory(
    ledger: Ledger, state: Path, tmp_path: Path
) -> None:
    directory, file = tmp_path / "directory", tmp_path / "file"
    ledger.directory(str(directory))
    ledger.file(str(file))
    (directory / "deep" / "deeper").mkdir(parents=True)
    (directory / "deep" / "file").touch()
    (directory / "link").symlink_to("/")
    file.touch()
    assert undo(ledger) == []
    assert not any(path.exists() for path in (directory, file, state))


def test_undoing_twice_is_harmless(ledger: Ledger, tmp_path: Path) -> None:
    ledger.directory(str(tmp_path / "never made"))
    ledger.file(str(tmp_path / "never made either"))
    assert undo(ledger) == []
    assert undo(ledger) == []


def test_a_ledger_stays_short_through_many_containers(ledger: Ledger, state: Path, tmp_path: Path) -> None:
    ledger.file(str(tmp_path / "kept"))
    ledger.created("stays")
    other = Ledger(str(state))
    for number in range(2000):
        ledger.created(f"container-{number:064}")
        ledger.deleted(f"container-{number:064}")
    other.created("joins")
    other.close()
    assert sum(file.stat().st_size for file in state.iterdir()) < 1 << 17
    again = Ledger(str(state))
    assert again.containers() == ledger.containers() == {"stays", "joins"}
    assert [entry.name for entry in again.entries()] == [str(tmp_path / "kept")]
    again.close()


def test_an_undone_entry_is_forgotten(ledger: Ledger, tmp_path: Path) -> None:
    kept, undone = tmp_path / "kept", tmp_path / "undone"
    ledger.undone(ledger.file(str(undone)))
    ledger.file(str(kept))
    assert [entry.name for entry in ledger.entries()] == [str(kept)]


def test_another_process_reads_the_ledger(ledger: Ledger, state: Path, tmp_path: Path) -> None:
    ledger.file(str(tmp_path / "file"))
    other = Ledger(str(state))
    assert other.entries() == ledger.entries()
    other.close()


def test_numbers_continue_after_those_of_another_process(ledger: Ledger, state: Path, tmp_path: Path) -> None:
    first = ledger.file(str(tmp_path / "first"))
    other = Ledger(str(state))
    other.undone(other.file(str(tmp_path / "second")))
    other.close()
    assert [entry.number for entry in ledger.entries()] == [first]


@pytest.mark.parametrize("cut", [2, 10, 40])
def test_a_torn_last_line_loses_only_itself(ledger: Ledger, state: Path, tmp_path: Path, cut: int) -> None:
    ledger.file(str(tmp_path / "whole"))
    ledger.file(str(tmp_path / "torn"))
    os.truncate(state / "ledger", (state / "ledger").stat().st_size - cut)
    other = Ledger(str(state))
    other.file(str(tmp_path / "after"))
    names = [entry.name for entry in other.entries()]
    other.close()
    assert names == [str(tmp_path / name) for name in ("whole", "after")]


def test_a_ledger_is_created_only_on_request(state: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Ledger(str(state))


def test_a_recorded_process_is_killed(ledger: Ledger) -> None:
    with subprocess.Popen(["/bin/sleep", "600"]) as child:
        ledger.process(child.pid, name="qemu")
        assert undo(ledger) == []
        assert child.wait(timeout=WITHIN_S) == -9


def test_a_recycled_pid_is_left_alone(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["/bin/sleep", "600"]) as child:
        real = host_process.identify
        monkeypatch.setattr(
            host_process, "identify", lambda pid: HostProcess(pid=pid, start_time=real(pid).start_time - 1)
        )
        ledger.process(child.pid, name="qemu")
        monkeypatch.undo()
        assert undo(ledger) == []
        assert child.poll() is None
        child.kill()


def test_undoing_spares_the_calling_process(ledger: Ledger) -> None:
    ledger.process(os.getpid(), name="shim")
    assert undo(ledger) == []


def test_a_process_that_ended_before_it_was_recorded_is_an_error(ledger: Ledger) -> None:
    with subprocess.Popen(["/bin/true"]) as child:
        child.wait()
    with pytest.raises(ProcessLookupError):
        ledger.process(child.pid, name="qemu")


def test_nothing_is_removed_while_a_recorded_process_lives(
    ledger: Ledger, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    ledger.file(str(file))
    with subprocess.Popen(["/bin/sleep", "600"]) as child:
        ledger.process(child.pid, name="virtiofsd")
        monkeypatch.setattr(host_process.signal, "pidfd_send_signal", lambda *_: None)
        [failure] = ledger.undo_all(deadline_s=0.01)
        child.kill()
    assert failure.startswith(f"process {child.pid} (virtiofsd): it outlived SIGKILL by 0.01 s;")
    assert file.exists()
    assert state.exists()


def test_a_link_in_the_place_of_a_parent_directory_is_not_followed(
    ledger: Ledger, state: Path, tmp_path: Path
) -> None:
    elsewhere, shared = tmp_path / "elsewhere", tmp_path / "shared"
    (elsewhere / "container").mkdir(parents=True)
    shared.mkdir()
    ledger.directory(str(shared / "container"))
    shared.rmdir()
    shared.symlink_to(elsewhere)
    [failure] = undo(ledger)
    assert "a symbolic link is now part of the path" in failure
    assert (elsewhere / "container").exists()
    assert state.exists()


def test_a_link_in_the_place_of_a_directory_is_removed_and_not_followed(
    ledger: Ledger, tmp_path: Path
) -> None:
    elsewhere, directory = tmp_path / "elsewhere", tmp_path / "directory"
    ledger.directory(str(directory))
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    directory.symlink_to(elsewhere)
    assert undo(ledger) == []
    assert not directory.is_symlink()
    assert (elsewhere / "file").exists()


def test_mounts_below_a_directory_are_detached_before_it_is_removed(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    script = f"""
import pathlib, subprocess
from shim.host.ledger import Ledger
root = pathlib.Path({str(tmp_path)!r})
precious = root / "precious"; precious.mkdir(); (precious / "file").touch()
state = root / "state"; state.mkdir()
ledger = Ledger(str(state), create=True)
for name in ("with space", "with\\\\backslash"):
    target = state / name
    target.mkdir()
    subprocess.run(["mount", "--bind", precious, target], check=True)
assert ledger.undo_all(deadline_s={WITHIN_S}) == []
assert not state.exists()
assert (precious / "file").exists()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        ["/usr/bin/unshare", "--mount", sys.executable, "-c", script],
        check=True,
        env=environment,
        timeout=WITHIN_S,
    )


def test_containers_are_added_and_removed(ledger: Ledger) -> None:
    for container in ("a", "b"):
        ledger.created(container)
    ledger.deleted("a")
    ledger.deleted("never there")
    assert ledger.containers() == {"b"}


def test_a_cgroup_that_is_briefly_busy_is_removed(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    ledger.cgroup(str(cgroup))
    refusals = iter([errno.EBUSY, errno.EBUSY])
    rmdir = os.rmdir

    def busy_at_first(path: str, **given: Any) -> None:
        if str(path) == str(cgroup) and (number := next(refusals, 0)):
            raise OSError(number, os.strerror(number), path)
        rmdir(path, **given)

    monkeypatch.setattr(os, "rmdir", busy_at_first)
    monkeypatch.setattr(ledger_module, "_CGROUP_EMPTY_S", WITHIN_S)
    assert undo(ledger) == []
    assert not cgroup.exists()


class Clock:
    """A clock that only sleep moves: it shows how long the code wants to wait, on any host."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_lock_that_is_never_released_delays_a_line_only_briefly(
    ledger: Ledger, state: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    clock = Clock()
    monkeypatch.setattr(file_lock, "time", clock)
    monkeypatch.setattr(ledger_module, "_LONG_BYTES", 0)
    with (state / "ledger").open("rb") as other:
        fcntl.flock(other, kind)
        ledger.created("one")
        ledger.deleted("other")  # also shortens the file
        assert 0 < clock.now_s < STATE_S
        assert ledger.containers() == {"one"}


@pytest.fixture
def other(ledger: Ledger, state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """Another process's ledger, which never gets the lock."""
    monkeypatch.setattr(file_lock, "time", Clock())
    ledger.created("one")
    other = Ledger(str(state))
    monkeypatch.setattr(other, "_locked", lambda _kind: contextlib.nullcontext(enter_result=False))
    yield other
    other.close()


def before(name: str, what: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen just before the next call of a function of ``os``."""
    original = getattr(os, name)

    def call(*arguments: Any) -> Any:
        monkeypatch.setattr(os, name, original)
        what()
        return original(*arguments)

    monkeypatch.setattr(os, name, call)


def test_a_line_that_is_added_without_the_lock_survives_the_shortening(
    ledger: Ledger, other: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    before("rename", lambda: other.created("two"), monkeypatch)
    ledger._shorten()
    assert ledger.containers() == {"one", "two"}


def test_a_line_that_goes_to_a_file_that_was_replaced_is_added_again(
    ledger: Ledger, other: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    before("write", ledger._shorten, monkeypatch)
    other.created("two")
    ledger.created("three")
    assert ledger.containers() == other.containers() == {"one", "two", "three"}

"""Shims forked by the zygote cannot be told from ones started anew, and nobody depends on it."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from shim import host_process, zygote

WITHIN_S = 15.0


def zygote_socket(containerd) -> Path:
    """Wait until a zygote serves."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        for path in (containerd.state_dir / "zygote").glob("*"):
            if path.is_socket():
                return path
        time.sleep(0.02)
    raise TimeoutError("no zygote serves")


def lock_holder(path: Path) -> int:
    """The zygote's pid: it alone has the lock's file open."""
    for link in Path("/proc").glob("[0-9]*/fd/3"):
        try:
            if str(link.readlink()) == f"{path}.lock":
                return int(link.parts[2])
        except OSError:
            continue
    raise LookupError(f"nobody holds {path}.lock")


def end(pid: int) -> None:
    assert host_process.end([host_process.identify(pid)], number=signal.SIGKILL, timeout_s=WITHIN_S) == []


@pytest.fixture
def warmed(containerd):
    """A containerd whose next shims a zygote forks; ``c1`` was started anew and made it come up."""
    containerd.configure(f'[shim]\nzygote = true\nstate_dir = "{containerd.state_dir}"\n')
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    pid = lock_holder(zygote_socket(containerd))
    yield containerd
    if Path(f"/proc/{pid}").exists():
        end(pid)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_forked_shim_is_like_one_started_anew(warmed):
    anew = warmed.daemon("c1")
    warmed.make_bundle("c2")
    assert warmed.run("start", "c2").returncode == 0
    forked = warmed.daemon("c2")

    assert parent(forked["pid"]) == lock_holder(zygote_socket(warmed)) != parent(anew["pid"])
    assert forked["session"] == forked["pid"]
    assert forked["command"] == anew["command"]
    assert forked["oom_score_adj"] == anew["oom_score_adj"]
    own = dict.fromkeys(("PWD", "PYTEST_CURRENT_TEST"))
    assert {**forked["environment"], **own} == {**anew["environment"], **own}
    assert forked["descriptors"].keys() == anew["descriptors"].keys()
    assert forked["descriptors"]["2"] == str(warmed.bundle("c2") / "log")


def test_process_lists_show_the_sandbox_of_a_forked_shim(warmed):
    warmed.make_bundle("c2")
    warmed.run("start", "c2")
    arguments = [each for each in warmed.daemon("c2")["arguments"] if each]
    assert arguments[arguments.index("-id") + 1] == "c2"
    assert "-zygote" not in arguments


def test_the_death_of_the_zygote_hurts_no_shim_and_the_next_start_works(warmed):
    warmed.make_bundle("c2")
    warmed.run("start", "c2")
    forked = warmed.daemon("c2")
    socket_path = zygote_socket(warmed)
    end(lock_holder(socket_path))
    assert Path(f"/proc/{forked['pid']}").exists()

    warmed.make_bundle("c3")
    assert warmed.run("start", "c3").returncode == 0
    assert warmed.daemon("c3")["pid"] != forked["pid"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        deadline = time.monotonic() + WITHIN_S
        while probe.connect_ex(str(socket_path)) != 0:  # the next one, which that start has left behind
            assert time.monotonic() < deadline
            time.sleep(0.02)
    end(lock_holder(socket_path))


def test_only_one_zygote_comes_up(warmed):
    first = lock_holder(zygote_socket(warmed))
    zygote_socket(warmed).unlink()  # as if it were not ready yet
    warmed.make_bundle("c2")
    assert warmed.run("start", "c2").returncode == 0
    assert lock_holder(next((warmed.state_dir / "zygote").glob("*.lock")).with_suffix("")) == first


def test_nonsense_leaves_the_zygote_serving(warmed):
    for message in (b"", b"{", b'{"unknown": 1}', b"[1]", b"\xff"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(zygote_socket(warmed)))
            client.send(message)
    before = lock_holder(zygote_socket(warmed))
    warmed.make_bundle("c2")
    assert warmed.run("start", "c2").returncode == 0
    assert parent(warmed.daemon("c2")["pid"]) == before


def test_the_socket_is_for_its_owner_only(warmed):
    assert zygote_socket(warmed).stat().st_mode & 0o777 == 0o600
    assert zygote_socket(warmed).parent.stat().st_mode & 0o777 == 0o700


def test_a_program_that_changed_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "module.py"
    file.touch()
    known = {str(file): file.stat().st_mtime_ns}
    assert zygote._unchanged(known)
    os.utime(file, ns=(1, 1))
    assert not zygote._unchanged(known)
    file.unlink()
    assert not zygote._unchanged(known)

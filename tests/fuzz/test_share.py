"""A guest cannot write outside the directory it shares with the host, nor where that is read-only."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto.containerd import task_v3_pb2
from shim.agent.guest_names import agent_id
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tests.fuzz.peers import ServedShim


ROOT = Path(__file__).parents[2]

# Like a shim and its virtio-fs daemon, which clones the mount namespace before any container exists.
PROGRAM = """
import ctypes, os, sys
from pathlib import Path
from shim.host import mounts

base, writes_to = Path(sys.argv[1]), sys.argv[4]
read_only, recursive = sys.argv[2] == "True", sys.argv[3] == "True"
share, guest_share, volume = (base / name for name in ("share", "guest-share", "volume"))
for directory in (share, guest_share, volume):
    directory.mkdir()
mounts.enter_private_namespace()
mounts.share_directory(share)
mounts.bind(share, guest_share, read_only=True, recursive=False)
begun, begin = os.pipe()
made, make = os.pipe()
daemon = os.fork()
if daemon == 0:
    mounts.enter_private_namespace()
    os.write(begin, b"x")
    os.read(made, 1)
    try:
        (guest_share / writes_to).symlink_to("/etc")
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)
os.read(begun, 1)
(share / "volume").mkdir()
mounts.bind(volume, share / "volume", read_only=read_only, recursive=recursive)
os.write(make, b"x")
print(os.waitstatus_to_exitcode(os.waitpid(daemon, 0)[1]))
"""


def guest_writes(directory: Any, *, to: Any, read_only: Any = False, recursive: bool = False) -> Any:
    """Write as a guest would; return the error number, or 0."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), str(read_only), str(recursive), to],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=True,
    )
    return int(ran.stdout)


@pytest.mark.parametrize("recursive", [False, True])
def test_a_writable_volume_can_be_written_to(tmp_path: Path, recursive: bool) -> None:
    assert guest_writes(tmp_path, to="volume/link", recursive=recursive) == 0
    assert (tmp_path / "volume" / "link").is_symlink()


@pytest.mark.parametrize("recursive", [False, True])
def test_a_read_only_volume_is_read_only_to_the_daemon_that_serves_it(
    tmp_path: Path, recursive: bool
) -> None:
    assert guest_writes(tmp_path, to="volume/link", read_only=True, recursive=recursive) == errno.EROFS
    assert list((tmp_path / "volume").iterdir()) == []


def test_a_guest_cannot_redirect_another_container_by_a_link(tmp_path: Path) -> None:
    assert guest_writes(tmp_path, to="next-container") == errno.EROFS
    assert not (tmp_path / "share" / "next-container").is_symlink()


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


SOURCES = {
    "socket": (make_socket, 3),
    "FIFO": (os.mkfifo, 3),
    "block device": (lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 200)), 3),
    "character device": (lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)), 3),
    "dangling link": (lambda path: path.symlink_to("/no/such/file"), 3),
    "link to itself": (lambda path: path.symlink_to(path), 3),
    "link to a device": (lambda path: path.symlink_to("/dev/null"), 3),
    "link to a file": (lambda path: path.symlink_to("/etc/hosts"), 0),
    "file": (lambda path: path.touch(), 0),
    "directory": (lambda path: path.mkdir(), 0),
}


def shared_by(shim: ServedShim) -> Any:
    return [path.name for path in (shim.directory / "state" / "share").iterdir()]


@pytest.mark.parametrize(("make", "code"), SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("destination", ["/data", "/..", "/a/../../b", f"/{'x' * 300}", "/a\nb"])
def test_only_files_and_directories_are_shared(
    shim: Any, make: Callable[..., Any], code: int, destination: str
) -> None:
    source = shim.directory / "source"
    make(source)
    mount = {"destination": destination, "type": "bind", "source": str(source), "options": ["bind", "ro"]}
    bundle = shim.write_bundle(
        "shared", json.dumps({"process": {"args": ["true"], "cwd": "/"}, "mounts": [mount]})
    )
    before = set(shim.directory.iterdir())
    try:
        with shim.connect() as peer:
            request = task_v3_pb2.CreateTaskRequest(id="shared", bundle=str(bundle))
            assert peer.ask("Create", request) == code
        names = {agent_id("box"), agent_id("shared")}
        assert all(name in names or name.startswith("+") for name in shared_by(shim))
        assert set(shim.directory.iterdir()) == before
        if code == 0:
            shim.remove("shared")
        assert set(shared_by(shim)) <= {agent_id("box")}
    finally:
        if stat.S_ISDIR(source.lstat().st_mode):
            source.rmdir()
        else:
            source.unlink()
    shim.assert_serves()

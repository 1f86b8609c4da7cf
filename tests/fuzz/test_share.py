"""What a guest may do with the directory it shares with the host: nothing outside it, nothing read-only."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# As in a shim and its virtio-fs daemon, which clones the mount namespace before there is any container.
PROGRAM = """
import ctypes, os, sys
from pathlib import Path
from shim import mounts

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


def guest_writes(directory, *, to, read_only=False, recursive=False):
    """What comes of a guest's writing in what it is shown: an error number, or 0."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), str(read_only), str(recursive), to],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return int(ran.stdout)


@pytest.mark.parametrize("recursive", [False, True])
def test_a_volume_is_as_writable_as_it_was_meant_to_be(tmp_path, recursive):
    assert guest_writes(tmp_path, to="volume/link", recursive=recursive) == 0
    assert (tmp_path / "volume" / "link").is_symlink()


@pytest.mark.parametrize("recursive", [False, True])
def test_a_read_only_volume_is_read_only_to_the_daemon_that_serves_it(tmp_path, recursive):
    assert guest_writes(tmp_path, to="volume/link", read_only=True, recursive=recursive) == errno.EROFS
    assert list((tmp_path / "volume").iterdir()) == []


def test_a_guest_cannot_put_a_link_in_the_way_of_another_container(tmp_path):
    assert guest_writes(tmp_path, to="next-container") == errno.EROFS
    assert not (tmp_path / "share" / "next-container").is_symlink()

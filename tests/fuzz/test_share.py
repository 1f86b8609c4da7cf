"""What a guest may do with the directory it shares with the host: nothing outside it, nothing read-only."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# As in a shim and its virtio-fs daemon: the daemon has a mount namespace of its own, made before the volume.
GUEST_WRITES = """
import ctypes, os, sys
from pathlib import Path
from shim import mounts

base = Path(sys.argv[1])
recursive = sys.argv[2] == "True"
share, volume = base / "share", base / "volume"
share.mkdir()
volume.mkdir()
mounts.enter_private_namespace()
mounts.share_directory(share)
begun, begin = os.pipe()
made, make = os.pipe()
daemon = os.fork()
if daemon == 0:
    mounts.enter_private_namespace()
    os.write(begin, b"x")
    os.read(made, 1)
    try:
        (share / "volume" / "written").touch()
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)
os.read(begun, 1)
(share / "volume").mkdir()
mounts.bind(volume, share / "volume", read_only=True, recursive=recursive)
os.write(make, b"x")
print(os.waitstatus_to_exitcode(os.waitpid(daemon, 0)[1]))
"""


@pytest.mark.parametrize("recursive", [False, True])
def test_a_read_only_volume_is_read_only_to_the_daemon_that_serves_it(tmp_path, recursive):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    ran = subprocess.run(
        [sys.executable, "-c", GUEST_WRITES, str(tmp_path), str(recursive)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ran.stdout == f"{errno.EROFS}\n", ran.stderr
    assert list((tmp_path / "volume").iterdir()) == []

"""A part of the machine that belongs to the tests alone: its mounts and its network."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

from pyroute2 import IPRoute

from tests.e2e.census import SHARED_DIRECTORIES

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
LOOPBACK_INDEX = 1
EMPTY_DIRECTORIES = ("/run/containerd", "/run/hako", "/run/netns", "/var/lib/cni")
OTHERS = ("/run/netns/", "/tmp/")


def enter() -> None:
    """Give this thread, and everything that it starts, separate mounts and a separate network.

    Everything in them is then made by the tests, and nothing belongs to another process: sockets,
    names and temporary mounts of others are out of sight. The root of the mounts is shared, as on a host with
    systemd. ``/sys`` shows the interfaces of the new network.

    :raises OSError: if the kernel refuses: the tests need root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare: mounts and network: the tests need root")
    with IPRoute() as network:
        network.link("set", index=LOOPBACK_INDEX, state="up")
    _mount("--make-rprivate", "/")
    mounts = Path("/proc/thread-self/mountinfo").read_text(encoding="utf-8").splitlines()
    for point in reversed([line.split()[4] for line in mounts]):
        if point.startswith(OTHERS):
            _unmount("--lazy", point)
    with tempfile.TemporaryDirectory() as sys:
        _mount("-t", "sysfs", "sysfs", sys)
        _mount("--rbind", "/sys/fs/cgroup", f"{sys}/fs/cgroup")
        _unmount("--lazy", "--recursive", "/sys")
        _mount("--move", sys, "/sys")
    for directory in EMPTY_DIRECTORIES:
        Path(directory).mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "hako-e2e", directory)
    _mount("--make-rshared", "/")
    for shared in SHARED_DIRECTORIES:
        shared.mkdir(mode=0o700, exist_ok=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["/usr/bin/mount", *arguments], check=True)


def _unmount(*arguments: str) -> None:
    subprocess.run(["/usr/bin/umount", *arguments], check=True)

"""Disk images made, checked and read with the tools of their filesystems, and mounts of them."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from proto.kata import oci_pb2
from tests.patience import patient

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
_TIMEOUT_S = patient(120)
_CHECKS = {"ext4": ("/usr/sbin/e2fsck", "-fn"), "xfs": ("/usr/sbin/xfs_repair", "-n")}


def make_disk(path: Path, fstype: str, *, size_mib: int, content: Path | None = None) -> Path:
    """Make a file that holds a filesystem, empty or with a copy of a tree."""
    path.touch()
    os.truncate(path, size_mib * MIB)
    # A tree can be put only into ext4.
    populate = ["-d", str(content)] if content is not None else []
    subprocess.run([f"/usr/sbin/mkfs.{fstype}", "-q", *populate, str(path)], check=True, timeout=_TIMEOUT_S)
    return path


def bound(destination: str, source: str, *options: str) -> oci_pb2.Mount:
    """Describe a bind mount as containerd does."""
    return oci_pb2.Mount(destination=destination, type="bind", source=source, options=["rbind", *options])


def check(disk: Path, fstype: str) -> None:
    """Fail if the filesystem was not unmounted well."""
    subprocess.run([*_CHECKS[fstype], str(disk)], check=True, capture_output=True, timeout=_TIMEOUT_S)


def content_of(disk: Path, path: str) -> bytes:
    """Read a file of an ext4 image after checking that."""
    check(disk, "ext4")
    argv = ["/usr/sbin/debugfs", "-R", f"cat {path}", str(disk)]
    return subprocess.run(argv, check=True, capture_output=True, timeout=_TIMEOUT_S).stdout

"""Volumes in huge pages: a file system of the host's pages becomes one of the guest's, for the whole pod.

The kubelet mounts an emptyDir with the medium HugePages as such a file system. A container may use as many
pages as its ``hugepageLimits`` allow, and the machine grows by them.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from proto.kata import agent_pb2, oci_pb2
from shim.errors import InvalidArgument

if TYPE_CHECKING:
    from shim.agent.oci_mounts import SharedMount

_TYPE = "hugetlbfs"
_LEAST_PAGE = 64 << 10  # on any Linux; nearly all other file systems have smaller blocks
_EMPTY_DIR = re.compile(r"/kubernetes\.io~empty-dir/[^/]+/?$")
_DIRECTORY = "/run/kata-containers/sandbox/ephemeral"
_UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


def volume(
    path: Path, shared: SharedMount, spec: oci_pb2.Spec, *, inherits_group: bool
) -> tuple[oci_pb2.Mount, agent_pb2.Storage] | None:
    """Describe a volume of huge pages to the guest.

    :param path: the source of a bind mount.
    :param shared: the bind mount.
    :param spec: the container's specification as it is sent.
    :param inherits_group: whether the agent can give new files to the volume's group, which no option of the
        file system does.
    :returns: the mount, and the mount that the guest makes first; None for any other volume.
    :raises InvalidArgument: if the file system is the host's own, or a part of one.
    """
    page_bytes = _page_bytes(path)
    if not page_bytes:
        return None
    real = os.path.realpath(path)
    whole = any(point == real and root == "/" for point, root in _mounts_of(path))
    if not (whole and _EMPTY_DIR.search(shared.source)):
        raise InvalidArgument(
            f"mounts: {shared.destination}: {shared.source}: a file system of the host's huge pages; use a "
            "whole emptyDir with the medium HugePages, or a mount of the type hugetlbfs"
        )
    status = path.stat()
    options = [
        f"pagesize={page_bytes}",
        f"mode={stat.S_IMODE(status.st_mode):o}",
        f"uid={status.st_uid}",
        f"gid={status.st_gid}",
    ]
    if inherits_group and status.st_mode & stat.S_ISGID:
        options.append(f"fsgid={status.st_gid}")
    limit = sum(
        one.Limit for one in spec.Linux.Resources.HugepageLimits if bytes_of(one.Pagesize) == page_bytes
    )
    if limit:
        options.append(f"size={limit}")
    name = hashlib.sha256(real.encode()).hexdigest()[:16]
    mount_point = f"{_DIRECTORY}/{name}"
    storage = agent_pb2.Storage(
        driver="ephemeral", source="nodev", fstype="hugetlbfs", mount_point=mount_point, options=options
    )
    mount = oci_pb2.Mount(
        destination=shared.destination, source=mount_point, type="bind", options=list(shared.options)
    )
    return mount, storage


def bytes_of(size: str) -> int:
    """Read a page's size as control groups write it, such as ``2MB``; 0 if it is malformed."""
    number, unit = size[:-2], size[-2:]
    return int(number) * _UNITS.get(unit, 0) if number.isascii() and number.isdigit() else 0


def _page_bytes(path: Path) -> int:
    """Find the page size of a file's file system; 0 if it is an ordinary one."""
    try:
        size = os.statvfs(path).f_bsize
        return size if size >= _LEAST_PAGE and _mounts_of(path) else 0
    except OSError:  # opening it later reports the error
        return 0


def _mounts_of(path: Path) -> list[tuple[str, str]]:
    """List the mounts of a file's huge-page file system: mount point and root of each."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = []
    for line in (
        Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    ):
        fields, _, system = line.partition(" - ")
        _, _, number, root, point, *_ = fields.split(" ")
        if number == wanted and system.split(" ")[0] == _TYPE:
            found.append((re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point), root))
    return found

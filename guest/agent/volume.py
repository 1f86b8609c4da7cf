"""Mounted volumes: reports how full they are, and grows them after their disk."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from guest.agent import files, uevent
from guest.agent.errors import AgentError

_SECTOR = 512
# include/uapi/linux: EXT4_IOC_RESIZE_FS; fs/xfs/libxfs/xfs_fs.h: XFS_IOC_FSGEOMETRY_V1, XFS_IOC_FSGROWFSDATA.
_EXT4_RESIZE = 0x40086610
_XFS_GEOMETRY, _XFS_GEOMETRY_BYTES = 0x80705864, 112
_XFS_GROW = 0x4010586E


def grow(mount_point: str, size_bytes: int) -> None:
    """Grow a filesystem to its disk once the disk has the given size.

    :param mount_point: where it is mounted.
    :param size_bytes: the size the disk is getting.
    :raises AgentError: if nothing is mounted there, it cannot grow while mounted, or the disk stays smaller.
    :raises OSError: if the filesystem refuses.
    """
    fstype = _type_at(mount_point)
    grow_mounted = {"ext4": _grow_ext4, "xfs": _grow_xfs}.get(fstype)
    if grow_mounted is None:
        raise AgentError(f"volume: {mount_point}: {fstype} does not grow while mounted; use ext4 or xfs")
    device = os.stat(mount_point).st_dev
    size = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size"
    uevent.wait_for(
        lambda: int(files.read(size)) * _SECTOR >= size_bytes or None,
        what=f"volume: {mount_point}: disk of {size_bytes} bytes",
    )
    fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        grow_mounted(fd, size_bytes // os.fstatvfs(fd).f_bsize)
    except OSError as error:
        # ext4 answers this if it already has that size.
        if error.errno != errno.EALREADY:
            raise
    finally:
        os.close(fd)


def _grow_ext4(fd: int, blocks: int) -> None:
    fcntl.ioctl(fd, _EXT4_RESIZE, struct.pack("Q", blocks))


def _grow_xfs(fd: int, blocks: int) -> None:
    geometry = fcntl.ioctl(fd, _XFS_GEOMETRY, bytes(_XFS_GEOMETRY_BYTES))
    inode_percent = struct.unpack_from("I", geometry, 28)[0]
    fcntl.ioctl(fd, _XFS_GROW, struct.pack("QIxxxx", blocks, inode_percent))


def _type_at(mount_point: str) -> str:
    found = None
    for line in files.read("/proc/self/mounts").splitlines():
        _source, target, fstype, _rest = line.split(" ", 3)
        if target == mount_point.rstrip("/"):
            # The latest mount hides the others.
            found = fstype
    if found is None:
        raise AgentError(f"volume: {mount_point}: nothing is mounted there; give a storage's mount point")
    return found

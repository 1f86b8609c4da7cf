"""A writer of newc cpio archives; the output depends only on the entries.

The format is the one the kernel reads (Documentation/driver-api/early-userspace/buffer-format.rst).
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveEntry:
    """One file of the archive, owned by root and dated at the epoch.

    :param path: absolute path in the guest.
    :param mode: type and permission bits.
    :param data: a file's bytes, or a symbolic link's target.
    :param device: major and minor of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, *, mode: int = 0o755) -> ArchiveEntry:
    """Describe a directory.

    :param path: absolute path in the guest.
    :param mode: permission bits.
    :returns: the entry.
    """
    return ArchiveEntry(path=path, mode=stat.S_IFDIR | mode)


def regular(path: str, data: bytes, *, mode: int = 0o644) -> ArchiveEntry:
    """Describe a regular file.

    :param path: absolute path in the guest.
    :param data: its content.
    :param mode: permission bits.
    :returns: the entry.
    """
    return ArchiveEntry(path=path, mode=stat.S_IFREG | mode, data=data)


def symlink(path: str, target: str) -> ArchiveEntry:
    """Describe a symbolic link.

    :param path: absolute path in the guest.
    :param target: where it points.
    :returns: the entry.
    """
    return ArchiveEntry(path=path, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(path: str, major: int, minor: int, *, mode: int = 0o600) -> ArchiveEntry:
    """Describe a character device node.

    :param path: absolute path in the guest.
    :param major: device major number.
    :param minor: device minor number.
    :param mode: permission bits.
    :returns: the entry.
    """
    return ArchiveEntry(path=path, mode=stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: Iterable[ArchiveEntry]) -> bytes:
    """Write an archive: entries sorted by path, every parent directory present, inodes numbered in order.

    :param entries: the files; a path given twice keeps its last entry.
    :returns: the archive's bytes.
    """
    by_path: dict[str, ArchiveEntry] = {}
    for entry in entries:
        by_path[entry.path] = entry
    for path in list(by_path):
        parent = path.rpartition("/")[0]
        while parent:
            by_path.setdefault(parent, directory(parent))
            parent = parent.rpartition("/")[0]
    # A parent sorts before its children because its path is their prefix.
    ordered = [by_path[path] for path in sorted(by_path)]
    parts = [_record(entry, inode) for inode, entry in enumerate(ordered, start=1)]
    parts.append(_record(ArchiveEntry(path=f"/{_TRAILER}", mode=0), 0))
    return b"".join(parts)


def _record(entry: ArchiveEntry, inode: int) -> bytes:
    name = entry.path.lstrip("/").encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(header) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)

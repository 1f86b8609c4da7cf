"""The kubelet's volumes in memory: a tmpfs on the host for each emptyDir with ``medium: Memory``.

The kubelet mounts one with the size of the volume and sets its owner. It makes the directories of subPaths in
it, and binds them elsewhere for the containers that use them.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from shim.host.mount_table import MountTable

_VOLUME = re.compile(r"(?P<volume>.*/kubernetes\.io~empty-dir/[^/]+)(/(?P<below>.+))?")
# The paths of sources that may be in such a volume: the volume, a file in it, or a subPath.
_CANDIDATE = re.compile(r"/kubernetes\.io~empty-dir/|/volume-subpaths/")
# A volume with more files than the kubelet itself puts there is shared instead.
_MOST_FILES = 256
_MOST_BYTES = 16 << 20
_FLAGS = {
    os.ST_RDONLY: "ro",
    os.ST_NOSUID: "nosuid",
    os.ST_NODEV: "nodev",
    os.ST_NOEXEC: "noexec",
    os.ST_NOATIME: "noatime",
}


@dataclass(frozen=True, slots=True)
class TmpfsPlace:
    """The place of a file in such a volume.

    :param volume: the volume's path on the host.
    :param below: the path of the file in it; empty for the volume itself.
    """

    volume: Path
    below: str


@dataclass(frozen=True, slots=True)
class File:
    """A file, directory or symbolic link in such a volume.

    :param below: its path in the volume.
    :param path: its path on the host.
    :param status: its lstat(2) result.
    """

    below: str
    path: Path
    status: os.stat_result

    def read(self) -> bytes:
        """Return the content of the file or the target of the link; a directory has none.

        :raises OSError: if it is gone.
        """
        if stat.S_ISLNK(self.status.st_mode):
            return os.fsencode(self.path.readlink())
        return self.path.read_bytes() if stat.S_ISREG(self.status.st_mode) else b""


def is_candidate(source: str) -> bool:
    """Tell whether the source of a bind mount may be in such a volume."""
    return _CANDIDATE.search(source) is not None


def find(descriptor: int) -> TmpfsPlace | None:
    """Find the volume in memory that a file is in.

    :param descriptor: the file, open.
    :returns: its place; None if it is not in such a volume.
    :raises OSError: if its mount is gone by now.
    """
    table = MountTable.read()
    place = table.locate(descriptor)
    if place.mount.fstype != "tmpfs":
        return None
    for name in table.names_of(place):
        match = _VOLUME.fullmatch(name)
        # Such a volume is a separate tmpfs.
        if match is not None and f"/{match['below'] or ''}" == place.path:
            return TmpfsPlace(Path(match["volume"]), match["below"] or "")
    return None


def size_of(volume: Path) -> int:
    """Return how much a volume holds at most, in bytes.

    :raises OSError: if it is gone.
    """
    status = os.statvfs(volume)
    return status.f_blocks * status.f_frsize


def options_of(volume: Path) -> list[str]:
    """Return the options that make another tmpfs like a volume.

    :raises OSError: if it is gone.
    """
    system, root = os.statvfs(volume), volume.stat()
    return [
        *(name for flag, name in _FLAGS.items() if system.f_flag & flag),
        f"size={system.f_blocks * system.f_frsize}",
        f"nr_inodes={system.f_files}",
        f"mode={stat.S_IMODE(root.st_mode):o}",
        f"uid={root.st_uid}",
        f"gid={root.st_gid}",
    ]


def content_of(volume: Path) -> list[File] | None:
    """List the files of a volume, each directory before its contents.

    :returns: the files; None if they are too many or too large to copy, or not all are plain files.
    :raises OSError: if one disappears meanwhile.
    """
    files: list[File] = []
    size = 0
    for directory, names, others in os.walk(volume):
        for name in sorted([*names, *others]):
            found = _file(volume, os.path.relpath(f"{directory}/{name}", volume))
            size += found.status.st_size
            if not _is_plain(found.status.st_mode) or len(files) == _MOST_FILES or size > _MOST_BYTES:
                return None
            files.append(found)
    return files


def way_to(place: TmpfsPlace) -> list[File]:
    """List the directories that lead to a file in a volume, and the file.

    :raises OSError: if it is gone.
    """
    parts = place.below.split("/") if place.below else []
    return [_file(place.volume, "/".join(parts[: count + 1])) for count in range(len(parts))]


def _file(volume: Path, below: str) -> File:
    path = volume / below
    return File(below, path, path.lstat())


def _is_plain(mode: int) -> bool:
    return stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISLNK(mode)

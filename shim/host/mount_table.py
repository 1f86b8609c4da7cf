"""The mounts that this process sees, and the place of a file in them; see /proc/pid/mountinfo in proc(5)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_IDMAPPED = "idmapped"


@dataclass(frozen=True, slots=True)
class HostMount:
    """One mount of the host.

    :param id: the kernel's number of it.
    :param device: major and minor number of the file system, as ``8:1``.
    :param root: the mounted path within its file system.
    :param point: where it is mounted.
    :param options: the options of the mount, not of its file system.
    :param fstype: the type of the file system.
    """

    id: int
    device: str
    root: str
    point: str
    options: frozenset[str]
    fstype: str


@dataclass(frozen=True, slots=True)
class FilePlace:
    """The place of a file.

    :param mount: the mount through which it was reached.
    :param real: its path without symbolic links.
    """

    mount: HostMount
    real: str

    @property
    def path(self) -> str:
        """Its path in its file system, which does not depend on the mount."""
        return _joined(self.mount.root, inside(self.real, self.mount.point) or "")

    @property
    def file_system(self) -> str:
        """Its file system; an id-mapped mount counts as another one."""
        unlike = f" by {self.mount.id}" if _IDMAPPED in self.mount.options else ""
        return f"{self.mount.device}{unlike}"


class MountTable:
    """The mounts at one moment.

    :param lines: the lines of a mountinfo file.
    """

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._mounts = {mount.id: mount for mount in map(_parse, lines)}

    @classmethod
    def read(cls) -> MountTable:
        """Read the mounts of this process."""
        return cls(Path("/proc/self/mountinfo").read_bytes().splitlines())

    def locate(self, descriptor: int) -> FilePlace:
        """Find an open file.

        :raises OSError: if its mount is already gone.
        """
        mount = self._mounts.get(mount_id(descriptor))
        if mount is None:
            raise OSError(f"descriptor {descriptor}: its mount is gone")
        return FilePlace(mount, path_of(descriptor))

    def below(self, real: str) -> list[HostMount]:
        """List the visible mounts below a path, the outer before the inner.

        :param real: a path without symbolic links.
        """
        found = [mount for mount in self._mounts.values() if inside(mount.point, real)]
        return sorted(filter(_is_seen, found), key=lambda mount: len(mount.point))

    def names_of(self, place: FilePlace) -> list[str]:
        """List the paths that lead to a file through any mount of its file system, its own path first."""
        names = [place.real]
        for mount in self._mounts.values():
            below = inside(place.path, mount.root)
            if mount.device == place.mount.device and below is not None:
                names.append(_joined(mount.point, below))
        return names


def inside(path: str, directory: str) -> str | None:
    """Return the rest of a path below a directory: empty for the directory itself, None if it is outside."""
    if path == directory:
        return ""
    prefix = f"{directory.rstrip('/')}/"
    return path.removeprefix(prefix) if path.startswith(prefix) else None


def _joined(directory: str, below: str) -> str:
    return f"{directory.rstrip('/')}/{below}".rstrip("/") or "/"


def mount_id(descriptor: int) -> int:
    """Return the number of the mount that a descriptor was opened through."""
    # st_dev does not help: a file system may be mounted below itself.
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def path_of(descriptor: int) -> str:
    """Return the path of an open file, without symbolic links."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _is_seen(mount: HostMount) -> bool:
    try:
        descriptor = os.open(mount.point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # The path is compared, too: a link may have led to another directory of the same mount.
        return mount_id(descriptor) == mount.id and path_of(descriptor) == mount.point
    finally:
        os.close(descriptor)


def _parse(line: bytes) -> HostMount:
    fields, _, described = line.partition(b" - ")
    number, _parent, device, root, point, options, *_ = fields.split(b" ")
    return HostMount(
        int(number),
        device.decode(),
        _unescaped(root),
        _unescaped(point),
        frozenset(options.decode().split(",")),
        described.partition(b" ")[0].decode(),
    )


def _unescaped(field: bytes) -> str:
    # Space, tab, newline and backslash are octal escapes.
    if b"\\" in field:
        field = field.decode("unicode_escape").encode("latin-1")
    return os.fsdecode(field)

"""The host's volumes that a sandbox's guest can reach: each file or directory once, for all its users.

The virtio-fs daemon makes a separate file system of every mount that it serves, with separate sockets, locks
and events. So a volume that containers share is mounted once in the share, and a part of it (a subPath) is a
path in the same mount. An entry is a copy of one mount; the mounts below it have their own entries. Later
mounts and unmounts of the host do not change it, and it does not prevent them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shim.agent.guest_names import volume_in_share
from shim.agent.guest_paths import SHARE_DIRECTORY
from shim.errors import Internal, InvalidArgument
from shim.host import mounts
from shim.host.mount_table import inside
from shim.host.volume_source import GuestWritable, identity, opened, walk_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shim.host.mount_table import FilePlace, HostMount, MountTable

# Such a volume belongs to one pod, so any container of the pod may act for all of them.
_EMPTY_DIR = re.compile(r"(?P<volume>.*/pods/[^/]+/volumes/kubernetes\.io~empty-dir/[^/]+)(/(?P<below>.+))?")


@dataclass(frozen=True, slots=True)
class Source:
    """An open file or directory of the host.

    :param descriptor: opened with O_PATH, see open(2).
    :param place: its place.
    :param inode: its device and its inode number.
    :param is_directory: whether it is a directory or a file.
    """

    descriptor: int
    place: FilePlace
    inode: tuple[int, int]
    is_directory: bool

    @classmethod
    def of(cls, descriptor: int, table: MountTable) -> Source:
        """Look at an open file.

        :raises OSError: if its mount is already gone.
        """
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        return cls(descriptor, table.locate(descriptor), identity(descriptor), is_directory)


@dataclass(slots=True, eq=False, kw_only=True)
class SharedEntry:
    """A file or directory in the share.

    :param name: its name in the share; no container's id begins with it.
    :param file_system: its file system on the host, :attr:`shim.host.mount_table.FilePlace.file_system`.
    :param path: its path in that file system.
    :param inode: its device and its inode number.
    :param is_directory: whether it is a directory or a file.
    :param is_pods: whether it belongs only to the pod.
    :param writable: whether the guest may write to it.
    :param covers: paths in it where a mount hides files that no container has.
    :param users: how many users hold a part of it.
    :param stages: the names under which the guest keeps parts of it.
    """

    name: str
    file_system: str
    path: str
    inode: tuple[int, int]
    is_directory: bool
    is_pods: bool
    writable: bool
    covers: frozenset[str]
    users: int = 0
    stages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """An entry, or a file or directory in one.

    :param entry: the entry.
    :param below: the path in it, empty for the whole.
    """

    entry: SharedEntry
    below: str = ""

    @property
    def path(self) -> str:
        """Its path in the guest's share."""
        return f"{SHARE_DIRECTORY}/{self.entry.name}/{self.below}".rstrip("/")

    @property
    def stage(self) -> str:
        """The name under which the guest keeps it, the same for all users."""
        return self.entry.stages[self.below]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How a source must be shared.

    :param label: the last part of a new entry's name, for an operator who looks at the share.
    :param write: whether the guest may write to it.
    :param hidden: paths in the source where a mount hides files from the guest.
    :param in_parts: whether the guest can mount a part of an entry without following links in it.
    """

    label: str
    write: bool
    hidden: frozenset[str] = frozenset()
    in_parts: bool


class SharedEntries:
    """The entries of one sandbox. Their undoing may be called from any thread.

    :param share: the directory that the guest sees.
    :param daemons: lists the processes that may be the virtio-fs daemon.
    """

    def __init__(self, share: Path, *, daemons: Callable[[], Iterable[int]]) -> None:
        self.share = share
        self.writable = GuestWritable()
        self._own = {str(share.parent)}
        self._daemons = daemons
        self._entries: list[SharedEntry] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def disregard(self, path: Path) -> None:
        """Exclude the shim's own mounts at or below a path from :meth:`below`."""
        self._own.add(str(path.resolve()))

    def below(self, place: FilePlace, table: MountTable) -> list[HostMount]:
        """List the host's mounts below a place, the outer before the inner."""
        return [
            mount
            for mount in table.below(place.real)
            if all(inside(mount.point, path) is None for path in self._own)
        ]

    def hold(self, source: Source, wish: Wish, table: MountTable) -> Part:
        """Share a source until :meth:`release`.

        :param source: what to share.
        :param wish: how.
        :param table: the host's mounts.
        :raises ShimError: if it cannot be mounted.
        """
        with self._lock:
            part = self._find(source, wish) or self._add(source, wish, table)
            try:
                if wish.write:
                    self._make_writable(part.entry)
                    self.writable.add(source.descriptor)
                return self._use(part, wish)
            finally:
                self._drop_unused(part.entry)

    def hold_parts(
        self, source: Source, part: Part, wish: Wish, *, without: Iterable[str]
    ) -> dict[str, Part]:
        """Hold the older entries of files in a source, so that all users see the same file systems.

        :param source: a directory.
        :param part: the part that was held for it.
        :param wish: how.
        :param without: mount points in the source.
        :returns: the entries by the path in the source.
        :raises ShimError: if one cannot be made writable.
        """
        held: dict[str, Part] = {}
        place = source.place
        with self._lock:
            for entry in self._entries:
                # A mounted file could not be replaced by another.
                is_like = entry.is_directory and entry.file_system == place.file_system
                below = inside(entry.path, place.path) if is_like else None
                if not below or any(inside(below, each) is not None for each in without):
                    continue
                if entry is part.entry or not self._leads_to(part, below, entry.inode):
                    continue
                if wish.write:
                    self._make_writable(entry)
                held[below] = self._use(Part(entry), wish)
        return held

    def release(self, part: Part) -> None:
        """Release a part; the last release removes the entry.

        :raises ShimError: if it cannot be unmounted.
        """
        with self._lock:
            part.entry.users -= 1
            self._drop_unused(part.entry)

    def uncover(self, part: Part, below: str) -> None:
        """Show the part of a source that a removed mount had hidden.

        :param below: where the mount was.
        :raises ShimError: if the cover cannot be unmounted.
        """
        with self._lock:
            if below in part.entry.covers:
                part.entry.covers -= {below}
                mounts.unmount(self.share / part.entry.name / below)

    def name(self, label: str) -> str:
        """Make a unique name among the volumes of the sandbox."""
        return volume_in_share(next(self._numbers), label)

    def _find(self, source: Source, wish: Wish) -> Part | None:
        place = source.place
        alike = [entry for entry in self._entries if entry.file_system == place.file_system]
        for entry in alike:
            if entry.inode == source.inode and entry.covers <= wish.hidden:
                return Part(entry)
        if not wish.in_parts:
            return None
        around: list[tuple[str, SharedEntry]] = []
        for entry in alike:
            below = inside(place.path, entry.path) if entry.is_directory else None
            # A guest that may write to a part of a volume must not write to the rest of it.
            if below and not entry.covers and (entry.writable or entry.is_pods or not wish.write):
                around.append((below, entry))
        for below, entry in sorted(around, key=lambda one: len(one[0])):
            if self._leads_to(Part(entry), below, source.inode):
                return Part(entry, below)
        return None

    def _leads_to(self, part: Part, below: str, inode: tuple[int, int]) -> bool:
        """Tell whether a path in an entry leads to a file without any link."""
        try:
            way = f"{part.entry.name}/{part.below}/{below}"
            with walk_down(self.share, way) as descriptor:
                return identity(descriptor) == inode
        except OSError:
            return False

    def _add(self, source: Source, wish: Wish, table: MountTable) -> Part:
        """Add an entry for a source, or for the pod's volume that contains it."""
        for name in table.names_of(source.place):
            match = _EMPTY_DIR.fullmatch(name)
            if match is None:
                continue
            if not match["below"]:
                return Part(self._mount(source, wish, is_pods=True))
            if wish.in_parts and not wish.hidden:
                part = self._add_around(source, Path(match["volume"]), wish, table)
                if part is not None:
                    return part
        return Part(self._mount(source, wish, is_pods=False))

    def _add_around(self, source: Source, volume: Path, wish: Wish, table: MountTable) -> Part | None:
        with contextlib.ExitStack() as stack:
            try:
                root = Source.of(stack.enter_context(opened(volume, self.writable)), table)
                below = inside(source.place.path, root.place.path)
                if not below or root.place.file_system != source.place.file_system:
                    return None
                found = identity(stack.enter_context(walk_down(root.descriptor, below)))
            except (OSError, InvalidArgument):
                return None
            if found != source.inode:
                return None
            return Part(self._mount(root, wish, is_pods=True), below)

    def _mount(self, source: Source, wish: Wish, *, is_pods: bool) -> SharedEntry:
        entry = SharedEntry(
            name=self.name(wish.label),
            file_system=source.place.file_system,
            path=source.place.path,
            inode=source.inode,
            is_directory=source.is_directory,
            is_pods=is_pods,
            writable=wish.write,
            covers=wish.hidden,
        )
        target = self.share / entry.name
        with contextlib.ExitStack() as undo:
            if source.is_directory:
                target.mkdir()
                undo.callback(target.rmdir)
            else:
                target.touch()
                undo.callback(target.unlink)
            undo.callback(mounts.unmount, target)
            self._bind(source, target, read_only=not wish.write)
            for below in wish.hidden:
                with walk_down(source.descriptor, below) as descriptor:
                    cover = dataclasses.replace(source, descriptor=descriptor)
                    self._bind(cover, target / below, read_only=True)
            undo.pop_all()
        if wish.write:
            self.writable.add(source.descriptor)
        self._entries.append(entry)
        return entry

    @staticmethod
    def _bind(source: Source, target: Path, *, read_only: bool) -> None:
        mounts.bind_opened(
            source.descriptor,
            target,
            read_only=read_only,
            read_only_below=False,
            recursive=False,
            follows=False,
            what=f"bind {source.place.real} on {target}",
        )

    def _drop_unused(self, entry: SharedEntry) -> None:
        if entry.users:
            return
        self._entries.remove(entry)
        target = self.share / entry.name
        mounts.unmount(target)
        if entry.is_directory:
            target.rmdir()
        else:
            target.unlink()

    def _make_writable(self, entry: SharedEntry) -> None:
        if entry.writable:
            return
        self._let_daemon_write(entry)
        entry.writable = True
        with walk_down(self.share, entry.name) as descriptor:
            self.writable.add(descriptor)

    def _let_daemon_write(self, entry: SharedEntry) -> None:
        for pid in self._daemons():
            with contextlib.suppress(FileNotFoundError), Path(f"/proc/{pid}/ns/mnt").open("rb") as namespace:
                if mounts.let_write(namespace.fileno(), f"/{entry.name}", entry.inode):
                    return
        raise Internal(f"mount: {entry.path}: the virtio-fs daemon does not have it; look at the host")

    def _use(self, part: Part, wish: Wish) -> Part:
        part.entry.users += 1
        if part.below not in part.entry.stages:
            part.entry.stages[part.below] = part.entry.name if not part.below else self.name(wish.label)
        return part

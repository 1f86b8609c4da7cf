"""A container's volumes: the guest's mounts for each of its bind mounts, as runc would make them on the host.

Options replace the flags of the source's own mount; without options, the flags are inherited. Mounts below
the source appear below the destination, each with its own flags.
"""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proto.kata import agent_pb2, oci_pb2
from shim.agent.guest_paths import VOLUMES_DIRECTORY, WATCHABLE_DIRECTORY
from shim.errors import Internal, InvalidArgument
from shim.host import mounts
from shim.host.mount_table import MountTable, inside
from shim.host.volume_source import opened, walk_down
from shim.volumes.followed_volumes import FLAGS, Below
from shim.volumes.shared_entries import Source, Wish

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from shim.agent.client import Agent
    from shim.agent.oci_mounts import SharedMount
    from shim.host.mount_table import HostMount
    from shim.volumes.followed_volumes import Followed, FollowedVolumes
    from shim.volumes.shared_entries import Part, SharedEntries

log = logging.getLogger(__name__)

_ATIME = frozenset({"noatime", "nodiratime"})
_SETTING = FLAGS | {"relatime", "strictatime", "sync", "dirsync", "mand"}
_CLEARING = frozenset(
    {"rw", "suid", "dev", "exec", "atime", "diratime", "norelatime", "nostrictatime", "async", "nomand"}
)
_PROPAGATION = frozenset(
    f"{recursive}{kind}" for recursive in ("", "r") for kind in ("private", "slave", "shared", "unbindable")
)
_PRIVATE = frozenset({"private", "rprivate", "unbindable", "runbindable"})
# Of mount_setattr(2), on the mounts below, too.
_RECURSIVE = frozenset(
    {"rro", "rnosuid", "rnodev", "rnoexec", "rnoatime", "rnodiratime", "rrelatime", "rstrictatime"}
    | {"rrw", "rsuid", "rdev", "rexec", "ratime", "rdiratime", "rnosymfollow", "rsymfollow"}
)


@dataclass(slots=True)
class Shown:
    """The description of a container's bind mounts for the guest.

    :param mounts: the mounts for the container's specification, in order.
    :param storages: mounts that the guest makes first, each for all containers that use it.
    :param is_slave: whether a mount follows later mounts of the guest.
    """

    mounts: list[oci_pb2.Mount] = field(default_factory=list)
    storages: list[agent_pb2.Storage] = field(default_factory=list)
    is_slave: bool = False


@dataclass(frozen=True, slots=True)
class _View:
    """A mount of the host that a container gets.

    :param source: its source.
    :param destination: its path in the container.
    :param flags: the flags of the container's mount.
    :param others: its other options.
    :param points: the mount points below it that the container also gets.
    """

    source: Source
    destination: str
    flags: list[str]
    others: list[str]
    points: list[str]

    def wish(self, *, in_parts: bool) -> Wish:
        """Describe how its source must be shared."""
        return Wish(
            label=posixpath.basename(self.destination.rstrip("/")) or "root",
            write="ro" not in self.flags and "rro" not in self.others,
            hidden=_hiding(self.source, self.points),
            in_parts=in_parts,
        )


class Volumes:
    """The volumes of one container.

    :param entries: the files that the sandbox's guest can reach.
    :param followed: the volumes that follow the host's mounts.
    :param agent: the guest's agent.
    :param shown: collects the description for the guest.
    """

    def __init__(
        self, entries: SharedEntries, followed: FollowedVolumes, *, agent: Agent, shown: Shown
    ) -> None:
        self._entries = entries
        self._followed = followed
        self._agent = agent
        self._shown = shown
        self._parts = contextlib.ExitStack()
        self._keeping: list[Followed] = []
        self._table: MountTable | None = None

    async def show(self, shared: SharedMount, *, bundle: Path) -> None:
        """Show the source of a bind mount.

        :param shared: the mount.
        :param bundle: the directory that its source may be relative to.
        :raises ShimError: if it cannot be shared or mounted.
        """
        path = bundle / shared.source
        with opened(path, self._entries.writable) as descriptor, _naming(path):
            table = self._table = self._table or MountTable.read()  # takes long on a host with many pods
            source = Source.of(descriptor, table)
            below: list[HostMount] = []
            if source.is_directory and "rbind" in shared.options and not shared.is_updated:
                below = self._entries.below(source.place, table)
            view = _View(
                source,
                shared.destination,
                _flags(shared.options, source.place.mount.options),
                _others(shared.options),
                _points(below, source),
            )
            if shared.is_updated:
                self._copy(self._hold(view, table), view)
            elif self._agent.is_hako and source.is_directory and _PRIVATE.isdisjoint(shared.options):
                await self._follow(view, table, shared.options)
            else:
                self._bind(view, table)
                for mount in below:
                    self._bind_inner(view, mount, below, table)

    async def take_back(self) -> None:
        """Release everything, after the guest has done so."""
        while self._keeping:
            await self._followed.release(self._keeping.pop(), agent=self._agent)
        await mounts.run_to_the_end(self._parts.close)

    def _hold(self, view: _View, table: MountTable) -> Part:
        part = self._entries.hold(view.source, view.wish(in_parts=self._agent.is_hako), table)
        self._parts.callback(self._entries.release, part)
        return part

    def _copy(self, part: Part, view: _View) -> None:
        """Let the guest keep a copy of a volume that the kubelet updates."""
        source = f"{WATCHABLE_DIRECTORY}/{part.stage}"
        self._shown.storages.append(_storage("watchable-bind", part, source))
        self._mount(view.destination, source, ["bind", "rprivate", *view.flags, *view.others])

    async def _follow(self, view: _View, table: MountTable, options: Iterable[str]) -> None:
        part = self._hold(view, table)
        below = Below.IGNORED
        if "rbind" in options:
            below = Below.READ if "rro" in options else Below.AS_THEY_ARE
        wish = view.wish(in_parts=True)
        followed = await self._followed.hold(view.source, wish, below, agent=self._agent)
        self._keeping.append(followed)
        self._shown.is_slave = True
        self._mount(view.destination, followed.stage, ["rbind", "rslave", *view.flags, *view.others])
        self._bind_parts(view, part, list(followed.shown))

    def _bind(self, view: _View, table: MountTable) -> None:
        part = self._hold(view, table)
        self._bind_one(part, view.destination, view)
        if view.source.is_directory:
            self._bind_parts(view, part, view.points)

    def _bind_inner(self, outer: _View, mount: HostMount, below: list[HostMount], table: MountTable) -> None:
        """Share the host's mounts below a source, with their flags."""
        way = inside(mount.point, outer.source.place.real) or ""
        try:
            with walk_down(outer.source.descriptor, way) as descriptor:
                source = Source.of(descriptor, table)
                flags = sorted(mount.options & FLAGS)
                destination = posixpath.join(outer.destination, way)
                view = _View(source, destination, flags, outer.others, _points(below, source))
                self._bind(view, table)
        except (
            OSError,
            ValueError,
            InvalidArgument,
        ) as error:  # it has disappeared, or cannot be bound or named
            log.warning("mount: %s is not shown: %s", mount.point, error)

    def _bind_parts(self, view: _View, part: Part, points: Iterable[str]) -> None:
        """Share the parts of a source that other containers have in the same way as there."""
        wish = view.wish(in_parts=self._agent.is_hako)
        parts = self._entries.hold_parts(view.source, part, wish, without=points)
        for way, inner in sorted(parts.items()):
            self._parts.callback(self._entries.release, inner)
            self._bind_one(inner, posixpath.join(view.destination, way), view)

    def _bind_one(self, part: Part, destination: str, view: _View) -> None:
        source = part.path
        if part.below or part.entry.is_directory:
            # If the guest did not mount it first, each container would get its own file system.
            source = f"{VOLUMES_DIRECTORY}/{part.stage}"
            driver = "bind" if self._agent.is_hako else "virtio-fs"
            self._shown.storages.append(_storage(driver, part, source))
        self._mount(destination, source, ["bind", "rprivate", *view.flags, *view.others])

    def _mount(self, destination: str, source: str, options: list[str]) -> None:
        mount = oci_pb2.Mount(destination=destination, source=source, type="bind", options=options)
        self._shown.mounts.append(mount)


def _points(below: Iterable[HostMount], source: Source) -> list[str]:
    return [point for mount in below if (point := inside(mount.point, source.place.real))]


def _storage(driver: str, part: Part, mount_point: str) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver=driver, source=part.path, fstype="bind", mount_point=mount_point, options=["bind"]
    )


def _flags(options: Iterable[str], inherited: frozenset[str]) -> list[str]:
    """Choose the flags of a bind mount.

    :param options: the options in the specification.
    :param inherited: the flags of the mount that contains the source.
    """
    given = _SETTING.intersection(options)
    if not given:
        return sorted(inherited & FLAGS)
    # A mount that is read-only on the host stays so.
    kept = inherited & (_ATIME | {"ro"})
    return sorted(given | kept)


def _others(options: Iterable[str]) -> list[str]:
    known = _SETTING | _CLEARING | _PROPAGATION | {"bind", "rbind"}
    return [option for option in options if option not in known]


def _hiding(source: Source, points: list[str]) -> frozenset[str]:
    """Choose the mount points in a source that hide files of the source."""
    if not points:
        return frozenset()
    with mounts.cloned(source.descriptor, what=source.place.real) as bare:
        return frozenset(point for point in points if _is_more_than_a_mount_point(bare, point))


def _is_more_than_a_mount_point(bare: int, point: str) -> bool:
    try:
        with walk_down(bare, point) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISDIR(status.st_mode):
                return status.st_size > 0
            with os.scandir(f"/proc/self/fd/{descriptor}") as found:
                return next(found, None) is not None
    except FileNotFoundError:  # it is part of the mount above it
        return False


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Translate an error of the host's files into one that names the volume."""
    try:
        yield
    except OSError as error:
        raise Internal(f"mount: {path}: {error.strerror or error}; look at the host") from error

"""A container's volumes: what the guest mounts for each of its bind mounts, as runc would on the host.

An option that sets a flag replaces those that the source's own mount has; without one they are inherited.
What is mounted below the source is mounted below the destination, each with the flags that it has there.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proto.kata import agent_pb2, oci_pb2
from shim import mounts
from shim.agent import VOLUMES_DIRECTORY, WATCHABLE_DIRECTORY
from shim.errors import Internal
from shim.mount_table import MountTable, inside
from shim.shared_entries import Source, Wish
from shim.volume_source import opened, walk_down

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from shim.mount_table import HostMount
    from shim.oci_mounts import SharedMount
    from shim.shared_entries import Part, SharedEntries

_ATIME = frozenset({"noatime", "nodiratime"})
_INHERITED = frozenset({"ro", "nosuid", "nodev", "noexec"}) | _ATIME
_SETTING = _INHERITED | {"relatime", "strictatime", "sync", "dirsync", "mand"}
_CLEARING = frozenset(
    {"rw", "suid", "dev", "exec", "atime", "diratime", "norelatime", "nostrictatime", "async", "nomand"}
)
_PROPAGATION = frozenset(
    f"{recursive}{kind}" for recursive in ("", "r") for kind in ("private", "slave", "shared", "unbindable")
)
_FOLLOWING = frozenset({"slave", "rslave"})
# Of mount_setattr(2), on what is mounted below, too.
_RECURSIVE = frozenset(
    {"rro", "rnosuid", "rnodev", "rnoexec", "rnoatime", "rnodiratime", "rrelatime", "rstrictatime"}
    | {"rrw", "rsuid", "rdev", "rexec", "ratime", "rdiratime", "rnosymfollow", "rsymfollow"}
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the guest is told of one bind mount.

    :param mounts: for the container's specification, in their order.
    :param storages: what the guest mounts before, each for all containers that ask for it.
    """

    mounts: list[oci_pb2.Mount] = field(default_factory=list)
    storages: list[agent_pb2.Storage] = field(default_factory=list)


class Volumes:
    """The volumes of one container.

    :param entries: what the sandbox's guest can reach.
    :param in_parts: whether the agent can mount a part of an entry without following links in it.
    :param held: is given what undoes it all.
    """

    def __init__(self, entries: SharedEntries, *, in_parts: bool, held: contextlib.ExitStack) -> None:
        self._entries = entries
        self._in_parts = in_parts
        self._held = held

    def show(self, shared: SharedMount, *, bundle: Path) -> Shown:
        """Show the source of a bind mount.

        :param shared: the mount.
        :param bundle: what its source may be relative to.
        :raises ShimError: if it is nothing that can be shared, or cannot be mounted.
        """
        shown = Shown()
        path = bundle / shared.source
        with opened(path, self._entries.writable) as descriptor, _naming(path):
            table = MountTable.read()
            source = Source.of(descriptor, table)
            below: list[HostMount] = []
            follows = source.is_directory and not _FOLLOWING.isdisjoint(shared.options)
            if source.is_directory and "rbind" in shared.options and not shared.is_updated and not follows:
                below = table.below(source.place.real)
            self._show_tree(shown, shared, source, below, table)
        return shown

    def _show_tree(
        self, shown: Shown, shared: SharedMount, source: Source, below: list[HostMount], table: MountTable
    ) -> None:
        flags = _flags(shared.options, source.place.mount.options)
        self._show_one(shown, shared, source, below, table, destination=shared.destination, flags=flags)
        for mount in below:
            way = inside(mount.point, source.place.real) or ""
            with walk_down(source.descriptor, way) as descriptor:
                inner = Source.of(descriptor, table)
                destination = posixpath.join(shared.destination, way)
                inherited = sorted(mount.options & _INHERITED)
                self._show_one(shown, shared, inner, below, table, destination=destination, flags=inherited)

    def _show_one(
        self,
        shown: Shown,
        shared: SharedMount,
        source: Source,
        below: list[HostMount],
        table: MountTable,
        *,
        destination: str,
        flags: list[str],
    ) -> None:
        points = [point for mount in below if (point := inside(mount.point, source.place.real))]
        wish = Wish(
            label=posixpath.basename(destination.rstrip("/")) or "root",
            write="ro" not in flags and "rro" not in shared.options,
            hidden=_hiding(source, points),
            in_parts=self._in_parts,
            follows=source.is_directory and not _FOLLOWING.isdisjoint(shared.options),
        )
        part = self._entries.hold(source, wish, table)
        self._held.callback(self._entries.release, part)
        options = ["bind", "rprivate", *flags, *_others(shared.options)]
        self._add(shown, part, destination, options, is_updated=shared.is_updated)
        if source.is_directory and not shared.is_updated and not wish.follows:
            parts = self._entries.hold_parts(source, part, wish, without=points)
            for way, inner in sorted(parts.items()):
                self._held.callback(self._entries.release, inner)
                self._add(shown, inner, posixpath.join(destination, way), options, is_updated=False)

    def _add(
        self, shown: Shown, part: Part, destination: str, options: list[str], *, is_updated: bool
    ) -> None:
        source = part.path
        if is_updated:
            source = f"{WATCHABLE_DIRECTORY}/{part.stage}"
            shown.storages.append(_storage("watchable-bind", part, source))
        elif part.entry.is_directory:
            # A container would make a file system of its own of what the guest itself has not mounted yet.
            source = f"{VOLUMES_DIRECTORY}/{part.stage}"
            shown.storages.append(_storage("bind" if self._in_parts else "virtio-fs", part, source))
        shown.mounts.append(
            oci_pb2.Mount(destination=destination, source=source, type="bind", options=options)
        )


def _storage(driver: str, part: Part, mount_point: str) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver=driver, source=part.path, fstype="bind", mount_point=mount_point, options=["bind"]
    )


def _flags(options: Iterable[str], inherited: frozenset[str]) -> list[str]:
    """Choose the flags of a bind mount.

    :param options: of the specification.
    :param inherited: of the mount that the source is in.
    """
    given = _SETTING.intersection(options)
    if not given:
        return sorted(inherited & _INHERITED)
    # What is read-only on the host stays so.
    kept = inherited & (_ATIME | {"ro"})
    return sorted(given | kept)


def _others(options: Iterable[str]) -> list[str]:
    known = _SETTING | _CLEARING | _PROPAGATION | {"bind", "rbind"}
    return [option for option in options if option not in known]


def _hiding(source: Source, points: list[str]) -> frozenset[str]:
    """Choose the mount points in a source below which it has files that the mounts hide."""
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
    except FileNotFoundError:  # it is in what is mounted above it
        return False


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what the host's files raise while they are looked at into an error that names the volume."""
    try:
        yield
    except OSError as error:
        raise Internal(f"mount: {path}: {error.strerror or error}; look at the host") from error

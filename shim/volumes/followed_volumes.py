"""Volumes that follow the host's mounts and unmounts below them while containers use them.

runc's containers see such changes through mounts with slave propagation. Here the guest keeps its own mount
of such a volume, and the containers' mounts are its slaves. The guest repeats the host's mounts below the
volume there. All of them are copies in the share, which do not prevent the host from unmounting its own.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proto.kata import agent_pb2
from shim.agent.guest_paths import VOLUMES_DIRECTORY
from shim.errors import ShimError
from shim.host import mounts
from shim.host.answering import all_answer
from shim.host.mount_changes import MountChanges
from shim.host.mount_table import MountTable, inside
from shim.volumes.shared_entries import Source, Wish

if TYPE_CHECKING:
    from shim.agent.client import Agent
    from shim.host.mount_table import FilePlace, HostMount
    from shim.sandbox.work import Work
    from shim.volumes.shared_entries import Part, SharedEntries

log = logging.getLogger(__name__)

FLAGS = frozenset({"ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"})
"""The flags that a bind mount inherits from its source, and that a guest's kernel knows, too."""


class Below(enum.Enum):
    """How to treat mounts that are below a volume when a container gets it."""

    AS_THEY_ARE = "as they are"
    READ = "read-only"
    IGNORED = "ignored"


@dataclass(slots=True, eq=False)
class Followed:
    """A volume.

    :param place: its place on the host.
    :param part: its part of the share.
    :param ignored: the ids of the mounts below it that stay hidden.
    :param read: the ids of the mounts below it that are read-only.
    :param stage: where the guest keeps it.
    :param shown: the mounts below it that the guest has: id and part, by the path in the volume.
    :param users: how many containers use it.
    """

    place: FilePlace
    part: Part
    ignored: frozenset[int]
    read: frozenset[int]
    stage: str
    shown: dict[str, tuple[int, Part]] = field(default_factory=dict)
    users: int = 1


class FollowedVolumes:
    """The followed volumes of a sandbox.

    :param entries: the files that its guest can reach.
    :param work: runs the task that follows the host's mounts, while there is a volume.
    """

    def __init__(self, entries: SharedEntries, *, work: Work) -> None:
        self._entries = entries
        self._work = work
        self._volumes: list[Followed] = []
        self._lock = asyncio.Lock()
        self._changes: MountChanges | None = None
        self._following: asyncio.Task[None] | None = None

    async def hold(self, source: Source, wish: Wish, below: Below, *, agent: Agent) -> Followed:
        """Let the guest keep a volume until :meth:`release`.

        :param source: the volume, a directory.
        :param wish: how its entry must be made.
        :param below: how to treat the mounts that are below it now.
        :param agent: the guest's.
        :raises ShimError: if something cannot be mounted.
        """
        async with self._lock:
            if self._changes is None:  # before the table is read
                self._changes = MountChanges()
                self._following = self._work.spawn(self._follow(self._changes, agent), name="host's mounts")
            table = MountTable.read()
            present = frozenset(mount.id for mount in self._entries.below(source.place, table))
            ignored = present if below is Below.IGNORED else frozenset()
            read = present if below is Below.READ else frozenset()
            part = self._entries.hold(source, wish, table)
            for one in self._volumes:
                if (one.place, one.part, one.ignored, one.read) == (source.place, part, ignored, read):
                    self._entries.release(part)
                    one.users += 1
                    return one
            stage = f"{VOLUMES_DIRECTORY}/{self._entries.name(wish.label)}"
            one = Followed(source.place, part, ignored, read, stage)
            self._volumes.append(one)
            try:
                await agent.files.change_volumes([_storage(part, stage, "shared")])
                await self._update(one, agent)
            except BaseException:
                one.users = 0
                await self._end(one, agent)
                raise
            return one

    async def release(self, one: Followed, *, agent: Agent) -> None:
        """Release a volume; with the last release, the guest unmounts it.

        :raises ShimError: if an entry of the share cannot be taken back.
        """
        async with self._lock:
            one.users -= 1
            if not one.users:
                await self._end(one, agent)

    def stop(self) -> None:
        """Stop following the host's mounts; stopping twice is harmless."""
        if self._following is not None:
            self._following.cancel()
        if self._changes is not None:
            self._changes.close()
        self._following = self._changes = None

    async def _end(self, one: Followed, agent: Agent) -> None:
        self._volumes.remove(one)
        if not self._volumes:
            self.stop()
        # The host first; the guest then drops mounts that are gone.
        ways = sorted(one.shown, reverse=True)
        for way in ways:
            await self._release(one.shown[way][1])
        await self._release(one.part)
        await _unmount([*(f"{one.stage}/{way}" for way in ways), one.stage], agent)

    async def _follow(self, changes: MountChanges, agent: Agent) -> None:
        while True:
            await changes.wait()
            with await agent.gate.waiting():
                async with self._lock:
                    for one in self._volumes:
                        try:
                            await self._update(one, agent)
                        except (
                            ShimError,
                            OSError,
                            ValueError,
                        ) as error:  # the guest cannot have such a name
                            log.warning("mounts below %s: %s", one.place.real, error)

    async def _update(self, one: Followed, agent: Agent) -> None:
        """Give the guest the host's mounts below a volume."""
        table = MountTable.read()
        wanted = {
            inside(mount.point, one.place.real) or "": mount
            for mount in self._entries.below(one.place, table)
            if mount.id not in one.ignored
        }
        for way, (number, _) in sorted(one.shown.items(), reverse=True):
            if way not in wanted or wanted[way].id != number:
                await self._hide(one, way, agent)
        for way, mount in wanted.items():
            if way not in one.shown:
                await self._show(one, way, mount, table, agent)

    async def _show(self, one: Followed, way: str, mount: HostMount, table: MountTable, agent: Agent) -> None:
        await all_answer([mount.point], phase=f"mounts below {one.place.real}")
        try:
            descriptor = os.open(mount.point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            log.debug("mounts: %s: %s", mount.point, error)
            return
        try:
            source = Source.of(descriptor, table)
            if source.place.mount.id != mount.id:  # it is already gone, which the next change reports
                return
            flags = mount.options & FLAGS
            if mount.id in one.read:
                flags |= {"ro"}
            wish = Wish(label=posixpath.basename(way), write="ro" not in flags, in_parts=True)
            part = self._entries.hold(source, wish, table)
        finally:
            os.close(descriptor)
        try:
            await agent.files.change_volumes([_storage(part, f"{one.stage}/{way}", *flags)])
        except BaseException:
            self._entries.release(part)
            raise
        one.shown[way] = mount.id, part

    async def _hide(self, one: Followed, way: str, agent: Agent) -> None:
        _, part = one.shown.pop(way)
        await self._release(part)
        await _unmount([f"{one.stage}/{way}"], agent)
        self._entries.uncover(one.part, way)

    async def _release(self, part: Part) -> None:
        await mounts.run_to_the_end(lambda: self._entries.release(part))


async def _unmount(mount_points: list[str], agent: Agent) -> None:
    storages = [agent_pb2.Storage(driver="bind", mount_point=point) for point in mount_points]
    try:
        await agent.files.change_volumes(storages)
    except ShimError as error:  # the machine, and everything with it, may be gone
        log.debug("mounts: %s: %s", mount_points[-1], error)


def _storage(part: Part, mount_point: str, *options: str) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver="bind", source=part.path, fstype="bind", mount_point=mount_point, options=["bind", *options]
    )

"""A pod's volumes in memory: each is a tmpfs of the guest that all containers of the pod use.

It is made with the first container that names the volume, like the one that the kubelet has mounted on the
host, and lasts as long as the machine. The kubelet's own files in it are copied. If a volume holds more than
can be copied, or the agent cannot make one, the host's directory is shared instead, for as long as the pod
lives.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from shim.agent.guest_paths import MEMORY_DIRECTORY, PARTS_DIRECTORY
from shim.agent.oci_fields import refusing_malformed
from shim.agent.oci_mount_kinds import OfTheGuest
from shim.agent.shared_memory import is_bind
from shim.errors import Internal, InvalidArgument, ShimError
from shim.host.volume_source import found
from shim.volumes import host_tmpfs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from shim.agent.client import Agent
    from shim.host.volume_source import GuestWritable
    from shim.machine.limits import Limits
    from shim.volumes.host_tmpfs import File, TmpfsPlace

log = logging.getLogger(__name__)


class User(Protocol):
    """A container that uses volumes, with its id and its limits."""

    id: str
    limits: Limits


@dataclass(slots=True)
class _Volume:
    """A volume that the guest has.

    :param path: where.
    :param size_bytes: how much it holds at most.
    :param parts: the mount points of its subPaths, by path.
    :param users: the memory limits of the containers that use it; 0 for none.
    :param left_bytes: how much ended containers may have left in it.
    """

    path: str
    size_bytes: int
    parts: dict[str, str] = field(default_factory=dict)
    users: dict[str, int] = field(default_factory=dict)
    left_bytes: int = 0


class MemoryVolumes:
    """The volumes in memory of one sandbox.

    :param writable: the directories in which its guest may write.
    :param host_bytes: the size of the host's memory, for tests. The kubelet gives a volume without a limit
        about all of it.
    """

    def __init__(self, writable: GuestWritable, *, host_bytes: int = 0) -> None:
        self._writable = writable
        self._host_bytes = host_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._volumes: dict[Path, _Volume | None] = {}
        self._numbers = itertools.count(1)
        self._lock = asyncio.Lock()
        self._most_bytes = 0

    async def serve(self, spec: dict[str, Any], *, user: User, agent: Agent) -> dict[str, Any]:
        """Let the guest make the volumes in memory that a container names.

        :param spec: the decoded ``config.json``.
        :param user: the container.
        :param agent: the guest agent.
        :returns: the specification with the guest's paths.
        :raises ShimError: if the specification is malformed, or the guest cannot make a part of a volume.
        """
        with refusing_malformed("config.json"):
            entries = spec.get("mounts") or []
            places = {
                number: place
                for number, entry in enumerate(entries)
                if is_bind(entry) and (place := self._place_of(entry.get("source") or "")) is not None
            }
        if not places:
            return spec
        given: dict[int, dict[str, Any]] = {}
        async with self._lock:
            for number, place in places.items():
                volume = await self._volume(place.volume, agent)
                if volume is None:
                    continue
                volume.users[user.id] = user.limits.memory_bytes
                entry = {**entries[number], "type": "bind", "source": volume.path}
                if place.below:
                    entry["source"] = await self._part(volume, place, agent)
                    given[number] = OfTheGuest(entry, part_of=f"{volume.path}/{place.below}")
                else:
                    given[number] = OfTheGuest(entry)
        return {**spec, "mounts": [given.get(number, entry) for number, entry in enumerate(entries)]}

    def needed_bytes(self, live: Mapping[str, Limits]) -> int:
        """Return how much memory they need beyond the limits of the live containers.

        As on a host, a container's files there count against its limit. For a container without a limit,
        the size of the volume counts. The files of a container with a limit still count after its end, but
        never more than the pod's containers had before.

        :param live: the limits of the live containers, by id.
        """
        now = sum(limits.memory_bytes for limits in live.values())
        self._most_bytes = max(self._most_bytes, now)
        left = unlimited = 0
        for volume in filter(None, self._volumes.values()):
            counted = volume.size_bytes if volume.size_bytes < self._host_bytes // 2 else 0
            for ended in volume.users.keys() - live.keys():
                limit = volume.users.pop(ended) or counted
                volume.left_bytes = max(volume.left_bytes, min(limit, volume.size_bytes))
            if any(not live[user].memory_bytes for user in volume.users):
                unlimited += counted
            else:
                left += volume.left_bytes
        return unlimited + min(left, self._most_bytes - now)

    def _place_of(self, source: str) -> TmpfsPlace | None:
        if not host_tmpfs.is_candidate(source):
            return None
        try:
            with found(source, self._writable) as descriptor:
                return host_tmpfs.find(descriptor)
        except (InvalidArgument, OSError):  # sharing it will report the error
            return None

    async def _volume(self, path: Path, agent: Agent) -> _Volume | None:
        if path not in self._volumes:
            try:
                self._volumes[path] = await self._make(path, agent)
            except (ShimError, OSError, ValueError) as error:  # no message can name a larger owner
                log.warning("volume: %s: the host's directory is shared: %s", path, error)
                self._volumes[path] = None
        return self._volumes[path]

    async def _make(self, path: Path, agent: Agent) -> _Volume | None:
        content = host_tmpfs.content_of(path)
        if content is None:
            log.info("volume: %s: holds more than is copied; the host's directory is shared", path)
            return None
        volume = _Volume(f"{MEMORY_DIRECTORY}/{next(self._numbers)}", host_tmpfs.size_of(path))
        await agent.files.mount_tmpfs(volume.path, options=host_tmpfs.options_of(path))
        for one in content:
            await _copy(one, volume, agent)
        return volume

    async def _part(self, volume: _Volume, place: TmpfsPlace, agent: Agent) -> str:
        """Make the kubelet's file or directory for a subPath in the guest's volume, unless it exists."""
        try:
            for one in host_tmpfs.way_to(place):
                if not await agent.files.has_file(f"{volume.path}/{one.below}"):
                    await _copy(one, volume, agent)
        except OSError as error:
            raise Internal(f"volume: {place.volume / place.below}: {error.strerror}") from error
        if place.below not in volume.parts:
            volume.parts[place.below] = f"{PARTS_DIRECTORY}/{next(self._numbers)}"
        return volume.parts[place.below]


async def _copy(one: File, volume: _Volume, agent: Agent) -> None:
    await agent.files.copy_file(f"{volume.path}/{one.below}", status=one.status, data=one.read())

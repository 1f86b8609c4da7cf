"""The events of one sandbox for its followers: the last ones, and each new one."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.errors import ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from google.protobuf.message import Message

READY = "/sandbox/ready"
END = "/sandbox/end"
PARKED = "/sandbox/parked"
AWAKE = "/sandbox/awake"
KEPT = 64
"""How many events are kept for later followers."""

_MOST_UNREAD = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxEvent:
    """Something that happened in a sandbox.

    :param number: its number, from 1 on.
    :param at_s: its time, in seconds since 1970.
    :param topic: containerd's, or one of this module's.
    :param container_id: empty if it happened to the machine.
    :param exec_id: empty if it happened to the container.
    :param exit_status: the status of a process that ended.
    :param text: further information, in one line.
    """

    number: int
    at_s: float
    topic: str
    container_id: str = ""
    exec_id: str = ""
    exit_status: int = 0
    text: str = ""


class EventFeed:
    """The events of one sandbox; adding one never waits and never fails."""

    def __init__(self) -> None:
        self._number = 0
        self._last: collections.deque[SandboxEvent] = collections.deque(maxlen=KEPT)
        self._followers: set[asyncio.Queue[SandboxEvent]] = set()

    def note(self, topic: str, message: Message | None = None, *, text: str = "") -> None:
        """Note an event.

        :param topic: its topic.
        :param message: containerd's message, for the ids and the exit status.
        :param text: one line.
        """
        self._number += 1
        container_id = getattr(message, "container_id", "")
        exec_id = getattr(message, "exec_id", "") or getattr(message, "id", "")
        event = SandboxEvent(
            number=self._number,
            at_s=time.time(),
            topic=topic,
            container_id=container_id,
            exec_id="" if exec_id == container_id else exec_id,
            exit_status=getattr(message, "exit_status", 0),
            text=text,
        )
        self._last.append(event)
        for unread in self._followers:
            with contextlib.suppress(asyncio.QueueFull):  # the follower notices the gap
                unread.put_nowait(event)

    async def events(self, *, follow: bool) -> AsyncGenerator[SandboxEvent, None]:
        """Yield the kept events.

        :param follow: continue with each new event, until this is closed.
        :raises ResourceExhausted: if the caller is too slow and has lost events.
        """
        unread: asyncio.Queue[SandboxEvent] = asyncio.Queue(_MOST_UNREAD)
        self._followers.add(unread)
        try:
            number = 0
            for event in list(self._last):
                yield event
                number = event.number
            while follow:
                event = await unread.get()
                if number and event.number > number + 1:
                    raise ResourceExhausted(f"events: {event.number - number - 1} lost; read them faster")
                if event.number > number:
                    yield event
                    number = event.number
        finally:
            self._followers.discard(unread)

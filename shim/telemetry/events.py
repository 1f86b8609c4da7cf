"""Events for containerd: one ordered queue, delivered over ttrpc, which never delays a reply.

containerd may restart at any time, with the same socket path. An event that cannot be delivered is kept and
tried again, so the order for each container survives the restart.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from proto.containerd import events_ttrpc_pb2
from shim.errors import DeadlineExceeded, ShimError, Unavailable
from shim.telemetry import latency
from shim.telemetry.event_feed import EventFeed
from shim.transport.ttrpc_client import TtrpcClient

if TYPE_CHECKING:
    from google.protobuf.message import Message

log = logging.getLogger(__name__)

SERVICE = "containerd.services.events.ttrpc.v1.Events"
QUEUE_LENGTH = 2048  # like containerd's own publisher: beyond it, the oldest event is dropped
FORWARD_TIMEOUT_S = 5.0  # containerd's publisher has the same limit for an attempt
RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 5.0


def pack(message: Message) -> Any:
    """Wrap a message the way containerd's typeurl does: the bare full name, no host part."""
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


class Publisher:
    """The events of one shim.

    :param address: path of containerd's ttrpc socket ("" without a listener: events are dropped).
    :param namespace: containerd namespace, put on every envelope and every call.
    """

    def __init__(self, address: str, *, namespace: str) -> None:
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        #: The same events and those of the machine, for followers of the sandbox.
        self.feed = EventFeed()
        self._queue: collections.deque[events_ttrpc_pb2.Envelope] = collections.deque(maxlen=QUEUE_LENGTH)
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()

    def publish(self, topic: str, message: Message) -> None:
        """Queue one event; returns at once and never fails.

        :param topic: for example ``/tasks/exit``.
        """
        self.feed.note(topic, message)
        if not self._address:
            return
        now = Timestamp()
        now.GetCurrentTime()
        if len(self._queue) == QUEUE_LENGTH:
            log.warning(
                "events: queue full at %d; dropping the oldest, %s", QUEUE_LENGTH, self._queue[0].topic
            )
            latency.drop("events")
        self._queue.append(
            events_ttrpc_pb2.Envelope(
                timestamp=now, namespace=self._namespace, topic=topic, event=pack(message)
            )
        )
        self._drained.clear()
        self._filled.set()

    async def run(self) -> None:
        """Deliver queued events in order until cancelled."""
        client: TtrpcClient | None = None
        delay_s = RETRY_FIRST_S
        try:
            while True:
                await self._filled.wait()
                envelope = self._queue[0]
                try:
                    if client is None:
                        client = await self._connect()
                    await self._forward(client, envelope)
                except (Unavailable, DeadlineExceeded) as error:
                    if client is not None:
                        await client.aclose()
                    client = None
                    log.debug("events: %s: %s; retrying in %.1f s", self._address, error, delay_s)
                    await asyncio.sleep(delay_s)
                    delay_s = min(delay_s * 2, RETRY_LONGEST_S)
                    continue
                except ShimError as error:  # containerd understood and refused, so trying again cannot help
                    log.warning("events: %s refused: %s", envelope.topic, error)
                delay_s = RETRY_FIRST_S
                if self._queue[0] is envelope:  # a full queue may have dropped it meanwhile
                    self._queue.popleft()
                if not self._queue:
                    self._filled.clear()
                    self._drained.set()
        finally:
            if client is not None:
                await client.aclose()

    async def drain(self, *, timeout_s: float) -> None:
        """Wait until every queued event is delivered, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()

    async def _connect(self) -> TtrpcClient:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)  # noqa: FBT003 - the library's signature
        try:
            async with asyncio.timeout(FORWARD_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(connection, self._address)
        except (OSError, TimeoutError) as error:
            connection.close()
            raise Unavailable(f"events: connect {self._address}: {error}") from error
        return await TtrpcClient.over(connection)

    async def _forward(self, client: TtrpcClient, envelope: events_ttrpc_pb2.Envelope) -> None:
        await client.call(
            SERVICE,
            "Forward",
            events_ttrpc_pb2.ForwardRequest(envelope=envelope),
            Empty,
            timeout_s=FORWARD_TIMEOUT_S,
            metadata={"containerd-namespace-ttrpc": self._namespace},
        )

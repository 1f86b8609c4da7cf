"""The QMP session against a peer that speaks real QMP over the inherited end of its socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from contextlib import ExitStack

import pytest

from hypervisor import QmpError
from hypervisor.exits import Shutdown
from hypervisor.qmp import QmpSession

GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}
}
TIMESTAMP = {"seconds": 1, "microseconds": 0}


class Peer:
    """QEMU's side of the connection."""

    def __init__(self, fd: int) -> None:
        self._stream = socket.socket(fileno=socket.dup(fd))
        self._stream.settimeout(0)
        self._received = bytearray()

    async def send(self, message):
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
        await asyncio.get_running_loop().sock_sendall(self._stream, data)

    async def receive(self):
        # The library sends no line ends: a command is over when its JSON is.
        while True:
            with contextlib.suppress(ValueError):
                message = json.loads(self._received)
                self._received.clear()
                return message
            chunk = await asyncio.get_running_loop().sock_recv(self._stream, 4096)
            assert chunk, "the session hung up"
            self._received += chunk

    async def negotiate(self):
        await self.send(GREETING)
        assert (await self.receive())["execute"] == "qmp_capabilities"
        await self.send({"return": {}})

    def hang_up(self):
        self._stream.close()


@pytest.fixture
async def ends():
    with ExitStack() as handover:
        session = QmpSession("test", handover=handover)
        peer = Peer(session.qemu_fd)
    yield session, peer
    peer.hang_up()
    await session.close()


@pytest.fixture
async def connected(ends):
    session, peer = ends
    async with asyncio.TaskGroup() as group:
        group.create_task(peer.negotiate())
        group.create_task(session.connect())
    return session, peer


@pytest.mark.parametrize(
    ("answer", "runs"),
    [
        ({"return": {"status": {"statuses": []}}}, False),
        ({"return": {"status": {"statuses": ["VIRTIO_CONFIG_S_DRIVER: Guest OS compatible"]}}}, False),
        ({"return": {"status": {"statuses": ["VIRTIO_CONFIG_S_DRIVER_OK: Driver setup and ready"]}}}, True),
        ({"return": {"status": "nonsense"}}, False),
        ({"error": {"class": "CommandNotFound", "desc": "no such command"}}, True),
    ],
    ids=["no driver", "driver being set up", "driver runs", "nonsense", "a QEMU that cannot tell"],
)
async def test_a_driver_runs_once_qemu_says_so(connected, answer, runs):
    session, peer = connected
    asking = asyncio.create_task(session.driver_runs("vsock"))
    query = await peer.receive()
    assert query["execute"] == "x-query-virtio-status"
    assert query["arguments"] == {"path": "/machine/peripheral/vsock/virtio-backend"}
    await peer.send({**answer, "id": query["id"]})
    assert await asking is runs


async def test_the_run_state_is_what_qemu_says(connected):
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    query = await peer.receive()
    assert query["execute"] == "query-status"
    await peer.send(
        {"return": {"status": "running", "running": True, "singlestep": False}, "id": query["id"]}
    )
    assert await asking == "running"


async def test_an_end_before_the_greeting_is_an_error_at_once(ends):
    session, peer = ends
    peer.hang_up()
    with pytest.raises(QmpError, match="connect"):
        await session.connect()


@pytest.mark.parametrize(
    "noise", [b"not json\r\n", b'{"QMP": 1}\r\n', b"[]\r\n"], ids=["text", "shape", "list"]
)
async def test_a_peer_that_does_not_speak_qmp_is_an_error(ends, noise):
    session, peer = ends
    await peer.send(noise)
    with pytest.raises(QmpError, match="connect"):
        await session.connect()


async def test_a_refused_command_carries_qemus_words(connected):
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    query = await peer.receive()
    await peer.send({"error": {"class": "GenericError", "desc": "not today"}, "id": query["id"]})
    with pytest.raises(QmpError, match="query-status: not today"):
        await asking


async def test_a_reply_of_the_wrong_shape_is_an_error(connected):
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    query = await peer.receive()
    await peer.send({"return": [], "id": query["id"]})
    with pytest.raises(QmpError, match="unexpected reply"):
        await asking


async def test_an_end_before_the_reply_is_an_error(connected):
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    await peer.receive()
    peer.hang_up()
    with pytest.raises(QmpError, match="query-status"):
        await asking


async def test_a_shutdown_event_sent_just_before_the_end_is_not_lost(connected):
    session, peer = connected
    assert session.shutdown is None
    event = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": TIMESTAMP}
    await peer.send(event)
    peer.hang_up()
    await session.drained()
    assert session.shutdown == Shutdown(by_guest=True, cause="guest-reset")


async def test_a_stop_counts_only_if_the_guest_is_broken(connected):
    session, peer = connected
    broken = asyncio.create_task(session.broken())
    for state in ("paused", "internal-error"):
        await peer.send({"event": "STOP", "timestamp": TIMESTAMP})
        query = await peer.receive()
        assert not broken.done()
        await peer.send(
            {"return": {"status": state, "running": False, "singlestep": False}, "id": query["id"]}
        )
    async with asyncio.timeout(5):
        assert await broken == "internal-error"


async def test_a_flood_of_events_is_not_kept(connected):
    session, peer = connected
    for number in range(200):
        await peer.send({"event": "RTC_CHANGE", "data": {"offset": number}, "timestamp": TIMESTAMP})
    peer.hang_up()
    await session.drained()
    assert session._client.events.history == ()
    assert session._lifecycle.history == ()

"""The QMP session against a peer that speaks real QMP over the inherited end of its socket."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from hypervisor import qmp
from hypervisor.errors import QmpError
from hypervisor.exits import Shutdown
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from typing import Any

    from tests.unit.hypervisor.conftest import Peer


TIMESTAMP = {"seconds": 1, "microseconds": 0}


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
async def test_a_driver_runs_once_qemu_says_so(
    connected: tuple[qmp.QmpSession, Peer], answer: dict[str, dict[str, Any]], runs: bool
) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.driver_runs("vsock"))
    query = await peer.receive()
    assert query["execute"] == "x-query-virtio-status"
    assert query["arguments"] == {"path": "/machine/peripheral/vsock/virtio-backend"}
    await peer.send({**answer, "id": query["id"]})
    assert await asking is runs


async def test_the_run_state_is_that_reported_by_qemu(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    query = await peer.receive()
    assert query["execute"] == "query-status"
    await peer.send(
        {"return": {"status": "running", "running": True, "singlestep": False}, "id": query["id"]}
    )
    assert await asking == "running"


async def test_an_end_before_the_greeting_is_an_error_at_once(ends: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = ends
    peer.hang_up()
    with pytest.raises(QmpError, match="connect"):
        await session.connect()


@pytest.mark.parametrize(
    "noise", [b"not json\r\n", b'{"QMP": 1}\r\n', b"[]\r\n"], ids=["text", "shape", "list"]
)
async def test_a_peer_that_does_not_speak_qmp_is_an_error(
    ends: tuple[qmp.QmpSession, Peer], noise: bytes
) -> None:
    session, peer = ends
    await peer.send(noise)
    with pytest.raises(QmpError, match="connect"):
        await session.connect()


async def test_a_refused_command_carries_qemus_words(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    query = await peer.receive()
    await peer.send({"error": {"class": "GenericError", "desc": "not today"}, "id": query["id"]})
    with pytest.raises(QmpError, match="query-status: not today"):
        await asking


async def test_a_reply_of_the_wrong_shape_is_an_error(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    query = await peer.receive()
    await peer.send({"return": [], "id": query["id"]})
    with pytest.raises(QmpError, match="unexpected reply"):
        await asking


async def test_an_end_before_the_reply_is_an_error(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    await peer.receive()
    peer.hang_up()
    with pytest.raises(QmpError, match="query-status"):
        await asking


async def test_a_shutdown_event_sent_just_before_the_end_is_not_lost(
    connected: tuple[qmp.QmpSession, Peer],
) -> None:
    session, peer = connected
    assert session.shutdown is None
    event = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": TIMESTAMP}
    await peer.send(event)
    peer.hang_up()
    await session.drained()
    assert session.shutdown == Shutdown(by_guest=True, cause="guest-reset")


async def test_a_stop_counts_only_if_the_guest_is_broken(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    broken = asyncio.create_task(session.broken())
    for state in ("paused", "internal-error"):
        await peer.send({"event": "STOP", "timestamp": TIMESTAMP})
        query = await peer.receive()
        assert not broken.done()
        await peer.send(
            {"return": {"status": state, "running": False, "singlestep": False}, "id": query["id"]}
        )
    async with asyncio.timeout(WITHIN_S):
        assert await broken == "internal-error"


async def test_a_listener_gets_all_events_from_its_start_on(
    connected: tuple[qmp.QmpSession, Peer],
) -> None:
    session, peer = connected
    with session.events("DEVICE_DELETED", "BLOCK_IO_ERROR") as events:
        for name in ("DEVICE_DELETED", "RESUME", "BLOCK_IO_ERROR"):
            await peer.send({"event": name, "data": {"device": name}, "timestamp": TIMESTAMP})
        heard = [await events.next() for _ in range(2)]
    assert [(event.name, event.data) for event in heard] == [
        ("DEVICE_DELETED", {"device": "DEVICE_DELETED"}),
        ("BLOCK_IO_ERROR", {"device": "BLOCK_IO_ERROR"}),
    ]


async def test_waiting_for_an_event_ends_with_the_session(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    with session.events("DEVICE_DELETED") as events:
        await peer.send({"event": "DEVICE_DELETED", "timestamp": TIMESTAMP})
        peer.hang_up()
        assert (await events.next()).data == {}
        with pytest.raises(QmpError, match="session ended"):
            await events.next()


async def test_a_descriptor_goes_with_its_name(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    reading, writing = os.pipe()
    sending = asyncio.create_task(session.send_fd(writing))
    query, (copy,) = await peer.receive_fds()
    assert query["execute"] == "getfd"
    await peer.send({"return": {}, "id": query["id"]})
    assert await sending == query["arguments"]["fdname"]
    os.write(copy, b"x")
    assert os.read(reading, 1) == b"x"
    for fd in (reading, writing, copy):
        os.close(fd)


async def test_a_flood_of_events_is_not_kept(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    for number in range(200):
        await peer.send({"event": "RTC_CHANGE", "data": {"offset": number}, "timestamp": TIMESTAMP})
    peer.hang_up()
    await session.drained()
    assert session._client.events.history == ()
    assert session._lifecycle.history == ()


async def test_a_command_may_take_as_long_as_a_longer_one_before_it(
    connected: tuple[qmp.QmpSession, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU does one after the other: it answers nothing while it pins a guest's memory."""
    session, peer = connected
    monkeypatch.setattr(qmp, "_COMMAND_TIMEOUT_S", 0.05)
    long = asyncio.create_task(session.ask(dict, "device_add", timeout_s=5.0))
    first = await peer.receive()
    short = asyncio.create_task(session.ask(dict, "query-status", timeout_s=0.05))
    second = await peer.receive()
    done, _ = await asyncio.wait([long, short], timeout=0.2)
    assert not done
    for query in (first, second):
        await peer.send({"return": {}, "id": query["id"]})
    assert (await long, await short) == ({}, {})
    with pytest.raises(QmpError, match="query-status: no answer within"):  # as ever, once it is done
        await asyncio.gather(session.ask(dict, "query-status", timeout_s=0.05), peer.receive())

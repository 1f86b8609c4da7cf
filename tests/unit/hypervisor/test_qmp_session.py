"""A QMP session with a peer that speaks real QMP over its end of the socket."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from hypervisor import qmp, qmp_client
from hypervisor.errors import QmpError
from hypervisor.exits import Shutdown
from tests.waiting import WITHIN_S, settle

if TYPE_CHECKING:
    from typing import Any

    from qemu.qmp.message import Message

    from tests.unit.hypervisor.conftest import Peer


TIMESTAMP = {"seconds": 1, "microseconds": 0}
RESET = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": TIMESTAMP}
MORE_THAN_ONE_TURN = 1000
"""So many events that the client lets other tasks run while it reads them."""


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
async def test_a_driver_counts_as_running_once_qemu_says_so(
    connected: tuple[qmp.QmpSession, Peer], answer: dict[str, dict[str, Any]], runs: bool
) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.driver_runs("vsock"))
    query = await peer.receive()
    assert query["execute"] == "x-query-virtio-status"
    assert query["arguments"] == {"path": "/machine/peripheral/vsock/virtio-backend"}
    await peer.send({**answer, "id": query["id"]})
    assert await asking is runs


async def test_the_run_state_is_read_from_qemu(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    query = await peer.receive()
    assert query["execute"] == "query-status"
    await peer.send(
        {"return": {"status": "running", "running": True, "singlestep": False}, "id": query["id"]}
    )
    assert await asking == "running"


async def test_an_end_before_the_greeting_is_an_immediate_error(ends: tuple[qmp.QmpSession, Peer]) -> None:
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


async def test_a_refused_command_quotes_qemu(connected: tuple[qmp.QmpSession, Peer]) -> None:
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
    await peer.send(RESET)
    peer.hang_up()
    await session.drained()
    assert session.shutdown == Shutdown(by_guest=True, cause="guest-reset")


async def test_a_command_sent_after_the_end_loses_no_event(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    await peer.send(RESET)
    peer.hang_up()
    with pytest.raises(QmpError, match="query-status"):
        await session.run_state()
    await session.drained()
    assert session.shutdown == Shutdown(by_guest=True, cause="guest-reset")


async def test_a_command_that_qemu_did_not_read_before_its_end_loses_no_event(
    connected: tuple[qmp.QmpSession, Peer],
) -> None:
    session, peer = connected
    asking = asyncio.create_task(session.run_state())
    await settle()
    for _each in range(MORE_THAN_ONE_TURN):
        await peer.send({"event": "RTC_CHANGE", "data": {"offset": 0}, "timestamp": TIMESTAMP})
    await peer.send(RESET)
    peer.hang_up()
    with pytest.raises(QmpError, match="query-status"):
        await asking
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


async def test_a_listener_gets_every_event_after_its_start(
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


async def test_a_descriptor_is_sent_with_its_name(connected: tuple[qmp.QmpSession, Peer]) -> None:
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


def event(name: str, number: int) -> bytes:
    """Write an event as QEMU does."""
    stamp = f'{{"seconds": {number}, "microseconds": 1}}'
    return f'{{"timestamp": {stamp}, "event": "{name}", "data": {{"number": {number}}}}}\r\n'.encode()


async def test_an_event_without_a_listener_is_not_decoded(
    connected: tuple[qmp.QmpSession, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, peer = connected
    decoded: list[bytes] = []
    message = qmp_client.Message

    def decode(line: bytes, *, eager: bool) -> Message:
        decoded.append(line)
        return message(line, eager=eager)

    monkeypatch.setattr(qmp_client, "Message", decode)
    with session.events("DEVICE_DELETED") as events:
        await peer.send(event("RTC_CHANGE", 1) + event("DEVICE_DELETED", 2))
        assert (await events.next()).data == {"number": 2}
    await peer.send(event("DEVICE_DELETED", 3))
    peer.hang_up()
    await session.drained()
    assert decoded == [event("DEVICE_DELETED", 2)]


@pytest.fixture
def frozen(connected: tuple[qmp.QmpSession, Peer]) -> tuple[qmp.QmpSession, Peer]:
    """A session in which nothing that the guest has used up comes back, however long the test takes."""
    client = connected[0]._client
    for allowance in (client._events, client._io_errors):
        allowance._per_s = 0
    return connected


@pytest.mark.parametrize("name", ["ACPI_DEVICE_OST", "GUEST_CRASHLOADED"])
async def test_far_more_events_than_an_honest_guest_causes_are_a_flood(
    frozen: tuple[qmp.QmpSession, Peer], name: str
) -> None:
    session, peer = frozen
    flooded = asyncio.create_task(session.flooded())
    with session.events("ACPI_DEVICE_OST") as events:
        await peer.send(b"".join(event(name, number) for number in range(10_000)))
        assert await flooded == name
        assert events.listener._queue.qsize() < 9000
        await peer.send(event("SHUTDOWN", 1))
        await asyncio.wait_for(session.shut_down(), WITHIN_S)


async def test_malformed_events_count_towards_a_flood(frozen: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = frozen
    flooded = asyncio.create_task(session.flooded())
    await peer.send(b'{"event": "ACPI_DEVICE_OST", "data": {}}\r\n' * 7000)
    assert await flooded == "ACPI_DEVICE_OST"


async def test_a_broken_disk_causes_no_flood_and_is_reported_a_few_times(
    frozen: tuple[qmp.QmpSession, Peer],
) -> None:
    session, peer = frozen
    flooded = asyncio.create_task(session.flooded())
    with session.events("BLOCK_IO_ERROR", "DEVICE_DELETED") as events:
        await peer.send(b"".join(event("BLOCK_IO_ERROR", number) for number in range(7000)))
        await peer.send(event("DEVICE_DELETED", 7000))
        heard: list[qmp.Event] = []
        while not heard or heard[-1].name != "DEVICE_DELETED":
            heard.append(await events.next())
    assert 100 <= len(heard) < 200
    assert not flooded.done()
    flooded.cancel()


async def test_other_tasks_run_while_a_flood_is_read(connected: tuple[qmp.QmpSession, Peer]) -> None:
    session, peer = connected
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        if not session._lifecycle.shut_down.is_set():
            asyncio.get_running_loop().call_soon(count)

    line = event("RTC_CHANGE", 1)
    reader = session._client._reader
    assert reader is not None
    reader.feed_data(line * 4000)
    await peer.send(event("SHUTDOWN", 1))
    count()
    await session.shut_down()
    assert turns >= 4000 / 100


async def test_a_command_may_also_use_the_time_of_the_command_before_it(
    connected: tuple[qmp.QmpSession, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU runs one command at a time: it does not answer while it pins a guest's memory."""
    session, peer = connected
    monkeypatch.setattr(qmp, "_COMMAND_TIMEOUT_S", 0.05)
    long = asyncio.create_task(session.ask(dict, "device_add", timeout_s=WITHIN_S))
    first = await peer.receive()
    short = asyncio.create_task(session.ask(dict, "query-status", timeout_s=0.05))
    second = await peer.receive()
    done, _ = await asyncio.wait([long, short], timeout=0.2)
    assert not done
    for query in (first, second):
        await peer.send({"return": {}, "id": query["id"]})
    assert (await long, await short) == ({}, {})
    with pytest.raises(QmpError, match="query-status: no answer within"):  # now with its own deadline
        await asyncio.gather(session.ask(dict, "query-status", timeout_s=0.05), peer.receive())

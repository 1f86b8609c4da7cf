"""The ttrpc server against clients that misbehave."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from proto import ttrpc_pb2
from proto.containerd import task_v3_pb2
from shim.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from shim.transport.ttrpc_codec import MAX_BODY, Frame, FrameDecoder, FrameType, encode_frame, encode_request
from shim.transport.ttrpc_server import TtrpcServer
from tests.waiting import WITHIN_S, reached, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from typing import Any

    from shim.transport.dispatch import Dispatch
    from tests.unit.shim.transport.conftest import MemoryTasks


TASK = "containerd.task.v3.Task"


class RawClient:
    """Sends any bytes and reads frames."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.setblocking(False)
        self.decoder = FrameDecoder()
        self.frames: list[Frame] = []

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> tuple[int, ttrpc_pb2.Response]:
        """Read the next response."""
        received = await self.receive_if_any()
        assert received is not None, "the connection has ended"
        return received

    async def receive_if_any(self) -> tuple[int, ttrpc_pb2.Response] | None:
        """Read the next response; None at the end of the connection."""
        while not self.frames:
            try:
                data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.frames += [frame for frame in self.decoder.feed(data) if isinstance(frame, Frame)]
        frame = self.frames.pop(0)
        return frame.stream_id, ttrpc_pb2.Response.FromString(frame.body)

    async def refused_as(self, error_class: type[Any]) -> str:
        _, response = await self.receive()
        assert response.status.code == error_class.code
        assert response.payload == b""
        return response.status.message


def request_frame(
    stream_id: int,
    method: str = "State",
    message: task_v3_pb2.CreateTaskRequest | task_v3_pb2.StateRequest | task_v3_pb2.WaitRequest | None = None,
    *,
    timeout_nano: int = 0,
) -> bytes:
    payload = (message or task_v3_pb2.StateRequest(id="ghost")).SerializeToString()
    return encode_request(
        stream_id, service=TASK, method=method, payload=payload, timeout_nano=timeout_nano, metadata={}
    )


async def begin_wait(client: RawClient, tasks: MemoryTasks) -> None:
    """Create a task, and begin to wait for it on stream 3."""
    await client.send(request_frame(1, "Create", task_v3_pb2.CreateTaskRequest(id="one")))
    await client.receive()
    await client.send(request_frame(3, "Wait", task_v3_pb2.WaitRequest(id="one")))
    await tasks.waits_begun.acquire()


@pytest.fixture
async def raw(ttrpc_server: TtrpcServer, tmp_path: Path) -> AsyncIterator[Callable[[], RawClient]]:
    clients = []

    def connect() -> RawClient:
        clients.append(RawClient(tmp_path / "ttrpc"))
        return clients[-1]

    yield connect
    for client in clients:
        client.sock.close()


async def test_an_answer_has_the_stream_id_of_its_request(raw: Callable[[], RawClient]) -> None:
    client = raw()
    await client.send(request_frame(7) + request_frame(9))
    assert [(await client.receive())[0], (await client.receive())[0]] == [7, 9]


@pytest.mark.parametrize(
    ("stream_id", "text"),
    [(0, "odd"), (2, "odd"), (3, "exceed"), (1, "exceed")],
    ids=["zero", "even", "reused", "lower"],
)
async def test_a_bad_stream_id_is_refused_and_the_connection_lives(
    raw: Callable[[], RawClient], stream_id: int, text: str
) -> None:
    client = raw()
    await client.send(request_frame(3))
    await client.refused_as(NotFound)
    await client.send(request_frame(stream_id))
    assert text in await client.refused_as(InvalidArgument)
    await client.send(request_frame(5))
    await client.refused_as(NotFound)


@pytest.mark.parametrize("flags", [1, 2], ids=["server streaming", "client streaming"])
async def test_a_streaming_call_is_unimplemented(raw: Callable[[], RawClient], flags: int) -> None:
    client = raw()
    await client.send(encode_frame(1, FrameType.REQUEST, request_frame(1)[10:], flags=flags))
    assert "streaming" in await client.refused_as(Unimplemented)


async def test_data_for_a_closed_stream_is_an_invalid_argument(
    raw: Callable[[], RawClient],
) -> None:
    client = raw()
    await client.send(encode_frame(1, FrameType.DATA, b"data"))
    assert "stream 1 is not open" in await client.refused_as(InvalidArgument)


async def test_an_oversized_request_is_refused_and_its_body_is_skipped(raw: Callable[[], RawClient]) -> None:
    client = raw()
    header = struct.pack(">IIBB", MAX_BODY + 1, 1, FrameType.REQUEST, 0)
    sending = asyncio.create_task(client.send(header + bytes(MAX_BODY + 1) + request_frame(3)))
    assert "4194305" in await client.refused_as(ResourceExhausted)
    await client.refused_as(NotFound)
    await sending


async def test_a_malformed_request_body_is_an_invalid_argument(raw: Callable[[], RawClient]) -> None:
    client = raw()
    await client.send(encode_frame(1, FrameType.REQUEST, b"\xff\xff\xff") + request_frame(3))
    await client.refused_as(InvalidArgument)
    await client.refused_as(NotFound)


async def test_the_timeout_of_a_request_limits_its_handler(
    raw: Callable[[], RawClient], tasks: MemoryTasks
) -> None:
    client = raw()
    await client.send(request_frame(1, "Create", task_v3_pb2.CreateTaskRequest(id="one")))
    await client.receive()
    await client.send(request_frame(3, "Wait", task_v3_pb2.WaitRequest(id="one"), timeout_nano=20_000_000))
    assert "0.02 s" in await client.refused_as(DeadlineExceeded)
    await tasks.waits_cancelled.acquire()


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, encode_frame(1, FrameType.RESPONSE, b"")],
    ids=["http", "noise", "a response"],
)
async def test_garbage_ends_only_its_own_connection(raw: Callable[[], RawClient], garbage: bytes) -> None:
    good, bad = raw(), raw()
    await good.send(request_frame(1))
    await good.refused_as(NotFound)
    await bad.send(garbage)
    assert await bad.receive_if_any() is None
    await good.send(request_frame(3))
    await good.refused_as(NotFound)


async def test_a_hang_up_inside_a_frame_is_harmless(raw: Callable[[], RawClient]) -> None:
    good, bad = raw(), raw()
    await bad.send(request_frame(1)[:15])
    bad.sock.close()
    await good.send(request_frame(1))
    await good.refused_as(NotFound)


async def test_a_half_closed_connection_counts_as_closed(
    raw: Callable[[], RawClient], tasks: MemoryTasks
) -> None:
    client = raw()
    await begin_wait(client, tasks)
    client.sock.shutdown(socket.SHUT_WR)
    await tasks.waits_cancelled.acquire()
    assert await client.receive_if_any() is None


async def test_a_client_that_does_not_read_is_paused_and_loses_nothing(
    raw: Callable[[], RawClient], tasks: MemoryTasks
) -> None:
    client = raw()
    tasks.bundles["big"] = "x" * 8192
    count = 20_000
    request = task_v3_pb2.StateRequest(id="big")
    stream = b"".join(request_frame(2 * number + 1, message=request) for number in range(count))
    sending = asyncio.create_task(client.send(stream))
    await reached(lambda: tasks.state_calls > 0)
    await asyncio.wait([sending], timeout=0.5)
    assert not sending.done()
    assert tasks.state_calls < 200
    assert {(await client.receive())[0] for _ in range(count)} == {2 * number + 1 for number in range(count)}
    await sending


async def test_draining_answers_calls_in_flight_and_ends_the_server(
    ttrpc_server: TtrpcServer, raw: Callable[[], RawClient], tasks: MemoryTasks
) -> None:
    client = raw()
    await begin_wait(client, tasks)
    draining = asyncio.create_task(ttrpc_server.drain(WITHIN_S))
    await settle()
    await client.send(request_frame(5))
    tasks.exits["one"].set_result(3)
    stream_id, response = await client.receive()
    assert stream_id == 3
    assert task_v3_pb2.WaitResponse.FromString(response.payload).exit_status == 3
    assert await client.receive_if_any() is None
    await draining


async def test_draining_gives_up_on_handlers_that_do_not_end(
    ttrpc_server: TtrpcServer, raw: Callable[[], RawClient], tasks: MemoryTasks
) -> None:
    client = raw()
    await begin_wait(client, tasks)
    await ttrpc_server.drain(0.05)
    await tasks.waits_cancelled.acquire()
    assert await client.receive_if_any() is None


async def test_a_drained_server_accepts_no_connection(ttrpc_server: TtrpcServer, tmp_path: Path) -> None:
    await ttrpc_server.drain(1)
    await settle()
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(tmp_path / "ttrpc"))


async def test_cancelling_the_server_cancels_its_handlers_and_hangs_up(
    dispatch: Dispatch, tasks: MemoryTasks, tmp_path: Path
) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "own"))
    serving = asyncio.create_task(TtrpcServer(dispatch).serve(listener))
    await settle()
    client = RawClient(tmp_path / "own")
    await client.send(request_frame(1, "Create", task_v3_pb2.CreateTaskRequest(id="one")))
    await client.receive()
    await client.send(request_frame(3, "Wait", task_v3_pb2.WaitRequest(id="one")))
    await tasks.waits_begun.acquire()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    await tasks.waits_cancelled.acquire()
    assert await client.receive_if_any() is None
    assert listener.fileno() == -1
    client.sock.close()

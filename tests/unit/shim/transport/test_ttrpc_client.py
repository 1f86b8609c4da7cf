"""The ttrpc client against a server whose frames the test writes."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from proto import ttrpc_pb2
from proto.kata import health_pb2
from shim.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, ShimError, Unavailable
from shim.transport.ttrpc_client import TtrpcClient
from shim.transport.ttrpc_codec import (
    MAX_BODY,
    MAX_STREAM_ID,
    Frame,
    FrameDecoder,
    FrameType,
    encode_error,
    encode_frame,
    encode_response,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any


ANSWER = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()


class ScriptedServer:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.decoder = FrameDecoder()
        self.frames: list[Frame] = []

    async def receive(self) -> tuple[int, ttrpc_pb2.Request]:
        """Read the next request: its stream id and message."""
        while not self.frames:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            assert data, "the client hung up"
            self.frames += [frame for frame in self.decoder.feed(data) if isinstance(frame, Frame)]
        frame = self.frames.pop(0)
        assert frame.kind is FrameType.REQUEST
        assert frame.flags == 0
        return frame.stream_id, ttrpc_pb2.Request.FromString(frame.body)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[TtrpcClient, ScriptedServer]]:
    near, far = socket.socketpair()
    client = await TtrpcClient.over(near)
    server = ScriptedServer(far)
    yield client, server
    await client.aclose()
    far.close()


@pytest.fixture
def client(pair: tuple[TtrpcClient, ScriptedServer]) -> TtrpcClient:
    return pair[0]


@pytest.fixture
def server(pair: tuple[TtrpcClient, ScriptedServer]) -> ScriptedServer:
    return pair[1]


def check(
    client: TtrpcClient,
    *,
    service: str = "",
    timeout_s: float | None = None,
    metadata: dict[str, str] | None = None,
) -> asyncio.Task[Any]:
    """Start one call."""
    request = health_pb2.CheckRequest(service=service)
    return asyncio.create_task(
        client.call(
            "grpc.Health",
            "Check",
            request,
            health_pb2.HealthCheckResponse,
            timeout_s=timeout_s,
            metadata=metadata or {},
        )
    )


async def test_a_request_carries_names_payload_timeout_and_metadata(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    call = check(client, service="agent", timeout_s=2.5, metadata={"containerd-namespace-ttrpc": "k8s.io"})
    stream_id, request = await server.receive()
    assert stream_id == 1
    assert (request.service, request.method) == ("grpc.Health", "Check")
    assert health_pb2.CheckRequest.FromString(request.payload).service == "agent"
    assert request.timeout_nano == 2_500_000_000
    assert {entry.key: entry.value for entry in request.metadata} == {"containerd-namespace-ttrpc": "k8s.io"}
    await server.send(encode_response(stream_id, ANSWER))
    assert (await call).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(("timeout_s", "nano"), [(None, 0), (1e30, (1 << 63) - 1)])
async def test_the_timeout_sent_is_capped_and_0_means_none(
    client: TtrpcClient, server: ScriptedServer, timeout_s: float | None, nano: int
) -> None:
    call = check(client, timeout_s=timeout_s)
    assert (await server.receive())[1].timeout_nano == nano
    call.cancel()


async def test_a_timeout_that_is_already_over_is_a_deadline_exceeded(client: TtrpcClient) -> None:
    with pytest.raises(DeadlineExceeded):
        await check(client, timeout_s=0)


async def test_stream_ids_are_odd_and_increase(client: TtrpcClient, server: ScriptedServer) -> None:
    calls = [check(client) for _ in range(4)]
    assert [(await server.receive())[0] for _ in calls] == [1, 3, 5, 7]
    for call in calls:
        call.cancel()


async def test_a_call_made_after_the_end_loses_no_answer_that_came_before_it(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    answered = check(client)
    stream_id, _request = await server.receive()
    await server.send(encode_response(stream_id, ANSWER))
    server.sock.close()
    late = check(client)
    with pytest.raises(Unavailable, match="closed by the peer"):
        await late
    assert (await answered).status == health_pb2.HealthCheckResponse.SERVING


async def test_answers_find_their_calls_in_any_order(client: TtrpcClient, server: ScriptedServer) -> None:
    calls = [check(client) for _ in range(3)]
    for _ in calls:
        await server.receive()
    await server.send(encode_error(5, code=3, message="third") + encode_response(1, ANSWER))
    with pytest.raises(InvalidArgument, match=r"^third$"):
        await calls[2]
    await calls[0]
    assert not calls[1].done()
    await server.send(encode_response(3, ANSWER))
    await calls[1]


async def test_an_explicit_status_of_zero_is_success(client: TtrpcClient, server: ScriptedServer) -> None:
    call = check(client)
    await server.receive()
    body = b"\x0a\x00" + ttrpc_pb2.Response(payload=ANSWER).SerializeToString()
    await server.send(encode_frame(1, FrameType.RESPONSE, body))
    assert (await call).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_status_without_its_own_class_is_the_base_error(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    call = check(client)
    await server.receive()
    await server.send(encode_error(1, code=16, message="who are you"))
    with pytest.raises(ShimError, match=r"^who are you$") as raised:
        await call
    assert type(raised.value) is ShimError


async def test_the_client_enforces_the_timeout_if_the_server_is_silent(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    with pytest.raises(DeadlineExceeded, match=r"grpc\.Health/Check: no answer within 0\.05 s"):
        await check(client, timeout_s=0.05)


@pytest.mark.parametrize("ending", ["cancelled", "timed out"])
async def test_a_late_answer_is_dropped_and_the_connection_stays_usable(
    client: TtrpcClient, server: ScriptedServer, ending: str
) -> None:
    call = check(client, timeout_s=0.05 if ending == "timed out" else None)
    await server.receive()
    if ending == "cancelled":
        call.cancel()
    with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
        await call
    following = check(client)
    await server.receive()
    await server.send(encode_response(1, b"") + encode_response(3, ANSWER))
    assert (await following).status == health_pb2.HealthCheckResponse.SERVING


async def test_losing_the_connection_fails_every_pending_and_later_call(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    calls = [check(client) for _ in range(3)]
    for _ in calls:
        await server.receive()
    server.sock.close()
    await client.wait_closed()
    for call in [*calls, check(client)]:
        with pytest.raises(Unavailable, match=r"grpc\.Health/Check: connection lost"):
            await call


async def test_a_cancelled_call_on_a_lost_connection_leaves_no_warning(
    client: TtrpcClient, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    call = check(client)
    await server.receive()
    await client.aclose()
    call.cancel()
    with pytest.raises((asyncio.CancelledError, Unavailable)):
        await call
    assert caplog.records == []


async def test_closing_twice_is_harmless(client: TtrpcClient) -> None:
    await client.aclose()
    await client.aclose()
    with pytest.raises(Unavailable, match="closed by this side"):
        await check(client)


@pytest.mark.parametrize(
    "garbage",
    [b"OK 1024\nnot ttrpc at all", encode_frame(1, FrameType.DATA, b"")],
    ids=["text", "stream data"],
)
async def test_a_server_that_does_not_speak_ttrpc_is_unavailable(
    client: TtrpcClient, server: ScriptedServer, garbage: bytes
) -> None:
    call = check(client)
    await server.receive()
    await server.send(garbage)
    with pytest.raises(Unavailable, match="dropped"):
        await call


async def test_an_answer_to_a_call_that_was_not_made_ends_the_connection(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    with pytest.raises(DeadlineExceeded):
        await check(client, timeout_s=0.01)
    call = check(client)
    await server.receive()
    stream_id, _ = await server.receive()
    late = encode_response(1, ANSWER)
    await server.send(late + encode_response(stream_id, ANSWER))
    await call
    await server.send(late)
    with pytest.raises(Unavailable, match="answered call 1, which was not made, or twice"):
        await check(client)


async def test_an_answer_over_the_calls_limit_is_not_decoded(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    call = asyncio.create_task(
        client.call(
            "grpc.Health", "Check", health_pb2.CheckRequest(), health_pb2.HealthCheckResponse,
            timeout_s=5, most_bytes=100,
        )
    )  # fmt: skip
    stream_id, _ = await server.receive()
    await server.send(encode_frame(stream_id, FrameType.RESPONSE, b"\xff" * 101))
    with pytest.raises(ResourceExhausted, match="answer of 101 bytes exceeds the limit of 100"):
        await call


async def test_an_oversized_answer_fails_only_its_call(client: TtrpcClient, server: ScriptedServer) -> None:
    call, other = check(client), check(client)
    await server.receive()
    await server.receive()
    await server.send(struct.pack(">IIBB", MAX_BODY + 1, 1, FrameType.RESPONSE, 0) + bytes(MAX_BODY + 1))
    with pytest.raises(ResourceExhausted, match="4194305"):
        await call
    await server.send(encode_response(3, ANSWER))
    await other


@pytest.mark.parametrize("body", [b"\xff\xff", b"\x12\x01\xff"], ids=["not a response", "not the message"])
async def test_an_answer_that_cannot_be_read_is_an_internal_error(
    client: TtrpcClient, server: ScriptedServer, body: bytes
) -> None:
    call = check(client)
    await server.receive()
    await server.send(encode_frame(1, FrameType.RESPONSE, body))
    with pytest.raises(Internal, match=r"not a valid grpc\.HealthCheckResponse"):
        await call


async def test_calls_wait_for_a_server_that_does_not_read_and_keep_their_order(
    client: TtrpcClient, server: ScriptedServer
) -> None:
    calls = [check(client, service="x" * (1 << 20)) for _ in range(8)]
    await asyncio.wait(calls, timeout=0.1)
    for number in range(8):
        stream_id, _ = await server.receive()
        assert stream_id == 2 * number + 1
        await server.send(encode_response(stream_id, ANSWER))
    for call in calls:
        await call


async def test_a_call_that_waits_for_room_still_has_its_deadline(client: TtrpcClient) -> None:
    filler = check(client, service="x" * (4_000_000))
    with pytest.raises(DeadlineExceeded):
        await check(client, timeout_s=0.05)
    filler.cancel()


async def test_a_connection_that_has_used_all_stream_ids_is_given_up(client: TtrpcClient) -> None:
    client._next_stream_id = MAX_STREAM_ID + 2
    with pytest.raises(Unavailable, match="connect again"):
        await check(client)
    await client.wait_closed()

"""Every server passes on the trace context that a request carries in its headers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import grpc
import pytest

from proto.containerd import task_v3_pb2
from shim.telemetry.trace_context import SANDBOX, TraceContexts
from shim.transport.grpc_on_demand import serve_grpc_on_demand
from shim.transport.grpc_server import serve_grpc
from shim.transport.ttrpc_client import TtrpcClient
from shim.transport.ttrpc_server import TtrpcServer
from tests.unit.shim.transport.conftest import TASK
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path
    from typing import Any

    from shim.transport.dispatch import Dispatch

    Create = Callable[..., Any]
    Serve = Callable[..., AbstractAsyncContextManager[Any]]

CARRIED = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "vendor=1"}


@contextlib.asynccontextmanager
async def over_grpc(path: Path) -> AsyncIterator[Create]:
    """Make tasks over gRPC, with metadata that also has what containerd and gRPC itself add."""
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call: Any = channel.unary_unary(
            f"/{TASK}/Create",
            request_serializer=task_v3_pb2.CreateTaskRequest.SerializeToString,
            response_deserializer=task_v3_pb2.CreateTaskResponse.FromString,
        )

        async def create(name: str, carried: dict[str, str]) -> None:
            metadata = [*carried.items(), ("containerd-namespace-ttrpc", "default"), ("extra-bin", b"\xff\0")]
            request = task_v3_pb2.CreateTaskRequest(id=name)
            await call(request, timeout=WITHIN_S, wait_for_ready=True, metadata=metadata)

        yield create


@contextlib.asynccontextmanager
async def over_ttrpc(path: Path) -> AsyncIterator[Create]:
    """Make tasks over ttrpc."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    client = await TtrpcClient.over(sock)

    async def create(name: str, carried: dict[str, str]) -> None:
        request, reply = task_v3_pb2.CreateTaskRequest(id=name), task_v3_pb2.CreateTaskResponse
        await client.call(TASK, "Create", request, reply, timeout_s=WITHIN_S, metadata=carried)

    yield create
    await client.aclose()


@contextlib.asynccontextmanager
async def serve_ttrpc(dispatch: Dispatch, path: Path, *, heed: Any) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        serving = asyncio.create_task(TtrpcServer(dispatch, heed=heed).serve(listener))
        yield
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@pytest.mark.parametrize(
    ("serve", "connect"),
    [(serve_ttrpc, over_ttrpc), (serve_grpc, over_grpc), (serve_grpc_on_demand, over_grpc)],
    ids=["ttrpc", "grpc", "grpc on demand"],
)
async def test_the_trace_context_of_a_request_arrives(
    dispatch: Dispatch, tmp_path: Path, serve: Serve, connect: Callable[[Path], Any]
) -> None:
    contexts = TraceContexts()
    async with serve(dispatch, tmp_path / "s", heed=contexts.heed), connect(tmp_path / "s") as create:
        await create("one", CARRIED)
        await create("two", {})

    assert contexts.take(SANDBOX) == CARRIED
    assert contexts.take("one") == CARRIED
    assert contexts.take("two") == {}

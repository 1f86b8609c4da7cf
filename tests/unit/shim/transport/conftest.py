"""A small task service in memory, real servers for each transport, and clients with one interface."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, TypeVar

import grpc
import pytest
from google.protobuf import any_pb2, empty_pb2

from proto.containerd import task_v2_pb2, task_v3_pb2
from shim.errors import AlreadyExists, FailedPrecondition, NotFound, from_code
from shim.transport.dispatch import Dispatch
from shim.transport.grpc_server import serve_grpc
from shim.transport.ttrpc_client import TtrpcClient
from shim.transport.ttrpc_server import TtrpcServer
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from typing import Any

    from google.protobuf.message import Message

TASK = "containerd.task.v3.Task"
Answer = TypeVar("Answer")


class MemoryTasks:
    """Tasks that exist only in memory; Pause, Resume and others are left out on purpose."""

    def __init__(self) -> None:
        self.bundles: dict[str, str] = {}
        self.exits: dict[str, asyncio.Future[int]] = {}
        self.state_calls = 0
        self.waits_begun = asyncio.Semaphore(0)
        self.waits_cancelled = asyncio.Semaphore(0)
        self.stats_bytes = 0
        self.delete_error = ""

    async def create(self, request: task_v3_pb2.CreateTaskRequest) -> task_v3_pb2.CreateTaskResponse:
        assert type(request) is task_v3_pb2.CreateTaskRequest
        if request.id in self.bundles:
            raise AlreadyExists(f"create: {request.id}: the id is taken; choose another")
        self.bundles[request.id] = request.bundle
        self.exits[request.id] = asyncio.get_running_loop().create_future()
        return task_v3_pb2.CreateTaskResponse(pid=len(self.bundles))

    async def state(self, request: task_v3_pb2.StateRequest) -> task_v3_pb2.StateResponse:
        self.state_calls += 1
        if request.id not in self.bundles:
            raise NotFound(f"state: {request.id}: no such task")
        return task_v3_pb2.StateResponse(id=request.id, bundle=self.bundles[request.id])

    async def wait(self, request: task_v3_pb2.WaitRequest) -> task_v3_pb2.WaitResponse:
        self.waits_begun.release()
        try:
            status = await asyncio.shield(self.exits[request.id])
        except asyncio.CancelledError:
            self.waits_cancelled.release()
            raise
        return task_v3_pb2.WaitResponse(exit_status=status)

    async def kill(self, request: task_v3_pb2.KillRequest) -> empty_pb2.Empty:
        self.exits[request.id].set_result(128 + request.signal)
        return empty_pb2.Empty()

    async def delete(self, _request: task_v3_pb2.DeleteRequest) -> None:
        raise FailedPrecondition(self.delete_error)

    async def pids(self, _request: task_v3_pb2.PidsRequest) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    async def close_io(self, _request: task_v3_pb2.CloseIORequest) -> None:
        return None

    async def stats(self, _request: task_v3_pb2.StatsRequest) -> task_v3_pb2.StatsResponse:
        return task_v3_pb2.StatsResponse(stats=any_pb2.Any(value=bytes(self.stats_bytes)))


@pytest.fixture
async def tasks() -> MemoryTasks:
    return MemoryTasks()


@pytest.fixture
def dispatch(tasks: MemoryTasks) -> Dispatch:
    return Dispatch(
        [
            (task_v3_pb2.DESCRIPTOR.services_by_name["Task"], tasks),
            (task_v2_pb2.DESCRIPTOR.services_by_name["Task"], tasks),
        ]
    )


@pytest.fixture
async def ttrpc_server(dispatch: Dispatch, tmp_path: Path) -> AsyncIterator[TtrpcServer]:
    """A running server whose socket is ``tmp_path / "ttrpc"``."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "ttrpc"))
    listener.listen()
    server = TtrpcServer(dispatch)
    serving = asyncio.create_task(server.serve(listener))
    yield server
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


@pytest.fixture
async def grpc_socket(dispatch: Dispatch, tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "grpc"
    async with serve_grpc(dispatch, path):
        yield path


class OverTtrpc:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        client = await TtrpcClient.over(sock)
        try:
            yield Client(client.call)
        finally:
            await client.aclose()


class OverGrpc:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        # With a pool of its own, the channel shares no connection with other channels to the same path.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(f"unix:{self.path}", options=options) as channel:

            async def call(
                service: str, method: str, request: Any, response_type: type[Any], *, timeout_s: float | None
            ) -> Any:
                stub = channel.unary_unary(
                    f"/{service}/{method}",
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=response_type.FromString,
                )
                try:
                    return await stub(request, timeout=timeout_s)
                except grpc.aio.AioRpcError as error:
                    raise from_code(error.code().value[0], error.details() or "") from error

            yield Client(call)


class Client:
    """The same calls over either transport; their errors are classes of ``shim.errors``."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    async def create(self, task_id: str, *, bundle: str = "/bundle") -> task_v3_pb2.CreateTaskResponse:
        request = task_v3_pb2.CreateTaskRequest(id=task_id, bundle=bundle)
        return await self._ask("Create", request, task_v3_pb2.CreateTaskResponse, timeout_s=WITHIN_S)

    async def state(self, task_id: str) -> task_v3_pb2.StateResponse:
        request = task_v3_pb2.StateRequest(id=task_id)
        return await self._ask("State", request, task_v3_pb2.StateResponse, timeout_s=WITHIN_S)

    async def wait(self, task_id: str, *, timeout_s: float | None = None) -> task_v3_pb2.WaitResponse:
        request = task_v3_pb2.WaitRequest(id=task_id)
        return await self._ask("Wait", request, task_v3_pb2.WaitResponse, timeout_s=timeout_s)

    async def kill(self, task_id: str, *, signal: int) -> empty_pb2.Empty:
        request = task_v3_pb2.KillRequest(id=task_id, signal=signal)
        return await self._ask("Kill", request, empty_pb2.Empty, timeout_s=WITHIN_S)

    async def _ask(
        self, method: str, request: Message, response_type: type[Answer], *, timeout_s: float | None
    ) -> Answer:
        response = await self.call(TASK, method, request, response_type, timeout_s=timeout_s)
        assert type(response) is response_type
        return response


@pytest.fixture(params=["ttrpc", "grpc"])
def transport(request: pytest.FixtureRequest) -> OverGrpc | OverTtrpc:
    """Run each test that uses this fixture over both transports."""
    if request.param == "ttrpc":
        server = request.getfixturevalue("ttrpc_server")
        del server
        return OverTtrpc(request.getfixturevalue("tmp_path") / "ttrpc")
    return OverGrpc(request.getfixturevalue("grpc_socket"))


@pytest.fixture
async def grpc_client(grpc_socket: Path) -> AsyncIterator[Client]:
    async with OverGrpc(grpc_socket).connect() as connected:
        yield connected


@pytest.fixture
async def client(transport: OverGrpc | OverTtrpc) -> AsyncIterator[Client]:
    async with transport.connect() as connected:
        yield connected

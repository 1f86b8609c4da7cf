"""Features of the gRPC socket alone: its file, health, reflection, and containerd 1.7's probe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shim.errors import Internal, Unavailable
from shim.transport import grpc_server
from shim.transport.grpc_on_demand import serve_grpc_on_demand
from shim.transport.grpc_server import serve_grpc
from tests.unit.shim.transport.conftest import OverGrpc
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.transport.dispatch import Dispatch
    from tests.unit.shim.transport.conftest import Client, MemoryTasks


GRPCURL = shutil.which("grpcurl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.fixture(params=[serve_grpc, serve_grpc_on_demand])
def serve(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """The server starts at once, or at the first connection."""
    serve: Callable[..., Any] = request.param
    return serve


async def grpcurl(path: Path, *arguments: Any) -> tuple[int | None, str, str]:
    """Run grpcurl on a unix socket.

    :returns: its exit status, standard output and standard error.
    """
    process = await asyncio.create_subprocess_exec(
        GRPCURL or "grpcurl",
        "-plaintext",
        "-unix",
        *arguments[:-1],
        str(path),
        *arguments[-1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(WITHIN_S):
        stdout, stderr = await process.communicate()
    return process.returncode, stdout.decode(), stderr.decode()


async def test_the_socket_is_for_its_owner_only_and_is_removed_at_the_end(
    serve: Callable[..., Any], dispatch: Dispatch, tmp_path: Path
) -> None:
    path = tmp_path / "grpc"
    before = os.umask(0)
    try:
        async with serve(dispatch, path):
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert not path.exists()


async def test_a_stale_socket_is_replaced(
    serve: Callable[..., Any], dispatch: Dispatch, tmp_path: Path
) -> None:
    path = tmp_path / "grpc"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with serve(dispatch, path), grpc.aio.insecure_channel(f"unix:{path}") as channel:
        async with asyncio.timeout(WITHIN_S):
            await channel.channel_ready()


@pytest.mark.parametrize("path", ["missing/grpc", "x" * 200], ids=["no directory", "too long"])
async def test_a_path_that_cannot_be_listened_on_is_one_clear_line(
    serve: Callable[..., Any], dispatch: Dispatch, tmp_path: Path, path: str
) -> None:
    with pytest.raises(Internal) as raised:
        async with serve(dispatch, tmp_path / path):
            pass
    assert str(raised.value).startswith(f"listen: {tmp_path / path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("service", ["", "containerd.task.v3.Task", "containerd.task.v2.Task"])
async def test_every_service_is_healthy(grpc_socket: Path, service: str) -> None:
    async with grpc.aio.insecure_channel(f"unix:{grpc_socket}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        response = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WITHIN_S)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_connection_that_closes_silently_is_harmless(grpc_socket: Path, grpc_client: Client) -> None:
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(grpc_socket))
    await grpc_client.create("one")


async def test_a_connection_that_sends_garbage_is_harmless(grpc_socket: Path, grpc_client: Client) -> None:
    with socket.socket(socket.AF_UNIX) as noise:
        noise.connect(str(grpc_socket))
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        await grpc_client.create("one")


async def test_stopping_lets_calls_in_flight_finish(
    serve: Callable[..., Any],
    dispatch: Dispatch,
    tasks: MemoryTasks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_server, "GRACE_S", WITHIN_S)
    path = tmp_path / "grpc"
    async with contextlib.AsyncExitStack() as stack:
        async with serve(dispatch, path):
            client = await stack.enter_async_context(OverGrpc(path).connect())
            await client.create("one")
            waiting = asyncio.create_task(client.wait("one"))
            await tasks.waits_begun.acquire()
            asyncio.get_running_loop().call_later(0.05, tasks.exits["one"].set_result, 4)
        assert (await waiting).exit_status == 4


async def test_stopping_cancels_calls_that_do_not_finish(
    serve: Callable[..., Any], dispatch: Dispatch, tasks: MemoryTasks, tmp_path: Path
) -> None:
    path = tmp_path / "grpc"
    async with contextlib.AsyncExitStack() as stack:
        async with serve(dispatch, path):
            client = await stack.enter_async_context(OverGrpc(path).connect())
            await client.create("one")
            waiting = asyncio.create_task(client.wait("one"))
            await tasks.waits_begun.acquire()
        await tasks.waits_cancelled.acquire()
        with pytest.raises(Unavailable):
            await waiting


async def test_grpcurl_lists_every_service(grpc_socket: Path) -> None:
    status, listed, complaint = await grpcurl(grpc_socket, ["list"])
    assert (status, complaint) == (0, "")
    assert set(listed.split()) == {
        "containerd.task.v2.Task",
        "containerd.task.v3.Task",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_grpcurl_describes_a_service_and_a_message(grpc_socket: Path) -> None:
    status, described, complaint = await grpcurl(grpc_socket, ["describe", "containerd.task.v3.Task"])
    assert (status, complaint) == (0, "")
    assert "rpc Create ( .containerd.task.v3.CreateTaskRequest )" in described
    _, described, _ = await grpcurl(grpc_socket, ["describe", ".containerd.task.v3.CreateTaskRequest"])
    assert "repeated .containerd.types.Mount rootfs = 3;" in described


async def test_grpcurl_calls_a_method(grpc_socket: Path) -> None:
    create = ["containerd.task.v3.Task/Create"]
    state = ["containerd.task.v3.Task/State"]
    assert (await grpcurl(grpc_socket, "-d", '{"id": "one", "bundle": "/b"}', create))[0] == 0
    status, answered, complaint = await grpcurl(grpc_socket, "-d", '{"id": "one"}', state)
    assert (status, complaint) == (0, "")
    assert json.loads(answered) == {"id": "one", "bundle": "/b"}


async def test_grpcurl_shows_an_error_with_its_code(grpc_socket: Path) -> None:
    status, _, complaint = await grpcurl(grpc_socket, "-d", '{"id": "no"}', ["containerd.task.v3.Task/State"])
    assert status != 0
    assert "Code: NotFound" in complaint
    assert "Message: state: no: no such task" in complaint

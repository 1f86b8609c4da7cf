"""The gRPC server that starts with the first connection."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc

from proto.containerd import task_v3_pb2
from shim.transport.grpc_on_demand import serve_grpc_on_demand
from tests.unit.shim.transport.conftest import TASK
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from pathlib import Path

    from shim.transport.dispatch import Dispatch


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def create(channel: grpc.aio.Channel, name: str) -> int:
    call = channel.unary_unary(
        f"/{TASK}/Create",
        request_serializer=task_v3_pb2.CreateTaskRequest.SerializeToString,
        response_deserializer=task_v3_pb2.CreateTaskResponse.FromString,
    )
    answer = await call(task_v3_pb2.CreateTaskRequest(id=name, bundle="/b"), timeout=WITHIN_S)
    return answer.pid


async def test_the_first_connections_are_served_like_later_ones(dispatch: Dispatch, tmp_path: Path) -> None:
    path = tmp_path / "grpc"
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
    async with serve_grpc_on_demand(dispatch, path):
        first = path.stat().st_ino
        async with (
            grpc.aio.insecure_channel(f"unix:{path}", options=options) as one,
            grpc.aio.insecure_channel(f"unix:{path}", options=options) as two,
        ):
            assert await create(one, "a") == 1
            assert path.stat().st_ino != first
            assert await create(two, "b") == 2
            assert await create(one, "c") == 3
    assert names_in(tmp_path) == []


async def test_no_server_runs_before_the_first_connection(dispatch: Dispatch, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    async with serve_grpc_on_demand(dispatch, tmp_path / "grpc"):
        assert set(threading.enumerate()) <= threads
    assert names_in(tmp_path) == []

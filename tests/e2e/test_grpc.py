"""The gRPC socket that every shim has beside its state: for tools, and for a life without containerd."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from google.protobuf import empty_pb2
from google.protobuf.message_factory import GetMessageClass

from proto.containerd import events_ttrpc_pb2, task_types_pb2, task_v3_pb2
from shim.transport.dispatch import Dispatch
from shim.transport.ttrpc_server import TtrpcServer
from tests.e2e.busybox import IMAGE, rootfs_archive
from tests.e2e.conftest import new_id
from tests.e2e.containerd import CALL_TIMEOUT_S, SHIM_DIRECTORY, SYSTEM_PATH

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from tests.e2e.conftest import Stack
    from tests.e2e.nursery import Nursery

pytestmark = pytest.mark.hako

DEADLINE_S = CALL_TIMEOUT_S
STOPPED = task_types_pb2.Status.Value("STOPPED")
TASK = task_v3_pb2.DESCRIPTOR.services_by_name["Task"]


def test_grpcurl_lists_and_calls_the_services(one_stack: Stack) -> None:
    containerd = one_stack.containerd
    name = new_id()
    started = containerd.run(IMAGE, name, "sleep", "1000", options=["--detach"])
    assert started.code == 0, started.stderr
    try:
        path = Path(one_stack.record(name).state_directory) / "grpc.sock"
        assert path.stat().st_mode & 0o777 == 0o600

        listed = grpcurl(path, "list").split()
        assert {"containerd.task.v2.Task", "containerd.task.v3.Task", "grpc.health.v1.Health"} <= set(listed)
        health = json.loads(grpcurl(path, "grpc.health.v1.Health/Check"))
        assert health == {"status": "SERVING"}
        state = json.loads(grpcurl(path, "containerd.task.v3.Task/State", body={"id": name}))
        assert (state["id"], state["status"]) == (name, "RUNNING")
        assert state["pid"] == containerd.tasks()[name][0]
    finally:
        containerd.remove(name)


def grpcurl(path: Path, *words: str, body: dict[str, str] | None = None) -> str:
    """Run ``grpcurl`` against a unix socket, and return its output."""
    data = ["-d", json.dumps(body)] if body is not None else []
    argv: list[str | Path] = [SHIM_DIRECTORY / "grpcurl", "-plaintext", "-unix", *data, path, *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Recorder:
    """The part of containerd that takes events."""

    def __init__(self) -> None:
        self.topics: list[str] = []

    async def forward(self, request: events_ttrpc_pb2.ForwardRequest) -> empty_pb2.Empty:
        """Note the topic of one event."""
        self.topics.append(request.envelope.topic)
        return empty_pb2.Empty()


class Shim:
    """containerd's calls to a shim, made by hand and over gRPC."""

    def __init__(self, stack: Stack, home: Path, *, container: str) -> None:
        self.bundle = home / "bundle"
        self.events = home / "events.sock"
        self._stack = stack
        self._container = container
        self._output = home / "reply"
        self._channel: grpc.aio.Channel | None = None

    def prepare(self, *command: str) -> Path:
        """Write the bundle of a container that runs ``command``, and return its root file system."""
        spec = {
            "ociVersion": "1.0.2",
            "process": {"args": command, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
        }
        (self.bundle / "rootfs").mkdir(parents=True)
        (self.bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")
        source = self.bundle.parent / "rootfs"
        with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
            archive.extractall(source, filter="fully_trusted")  # noqa: S202 - made by this very test
        return source

    def act(self, action: str, *flags: str | Path) -> bytes:
        """Run the shim's executable, and return its output."""
        program = SHIM_DIRECTORY / "containerd-shim-hako-v2"
        nursery = self._stack.containerd.nursery
        self._output.write_bytes(b"")
        pid = nursery.spawn(
            [
                program,
                *("-namespace", "by-hand", "-id", self._container),
                *("-address", self._stack.containerd.address, "-publish-binary", "/bin/true"),
                *flags,
                action,
            ],
            environment={
                "PATH": SYSTEM_PATH,
                "HAKO_CONFIG": str(self._stack.config),
                "TTRPC_ADDRESS": str(self.events),
                "MAX_SHIM_VERSION": "2",
            },
            directory=self.bundle,
            stdout=self._output,
            stderr=self._output,
        )
        status = nursery.wait(pid, timeout_s=DEADLINE_S)
        assert status == 0, self._output.read_text()
        return self._output.read_bytes()

    def connect(self) -> None:
        """Open the gRPC socket beside the shim's state."""
        state = self._stack.record(self._container).state_directory
        self._channel = grpc.aio.insecure_channel(f"unix://{state}/grpc.sock")

    async def call(self, name: str, **fields: Any) -> Any:
        """Call one method of the task service on the container."""
        assert self._channel is not None
        method = TASK.methods_by_name[name]
        request: type[Message] = GetMessageClass(method.input_type)
        response: type[Message] = GetMessageClass(method.output_type)
        call = self._channel.unary_unary(
            f"/{TASK.full_name}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        message = request(id=self._container, **fields)
        return await call(message, timeout=DEADLINE_S, wait_for_ready=True)

    async def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()


def wait_until_only(nursery: Nursery, pids: set[int]) -> None:
    """Wait until no other process than ``pids`` is left below the nursery.

    :raises TimeoutError: if one still is at the deadline.
    """
    deadline = time.monotonic() + DEADLINE_S
    while left := [process for process in nursery.descendants() if process.pid not in pids]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still there: {left}")
        time.sleep(0.02)


async def test_a_container_lives_its_whole_life_over_grpc_without_containerd(
    one_stack: Stack, home: Path
) -> None:
    place = home / "by-hand"
    place.mkdir()
    shim = Shim(one_stack, place, container=new_id())
    rootfs = shim.prepare("sh", "-c", "uname -r; echo problem >&2; exit 42")
    outputs = {name: place / name for name in ("stdout", "stderr")}
    readers = {}
    for name, path in outputs.items():
        os.mkfifo(path, 0o700)
        readers[name] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    before = {process.pid for process in one_stack.containerd.nursery.descendants()}
    events = Recorder()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(shim.events))
    listener.listen()
    listener.setblocking(False)
    service = events_ttrpc_pb2.DESCRIPTOR.services_by_name["Events"]
    serving = asyncio.create_task(TtrpcServer(Dispatch([(service, events)])).serve(listener))
    try:
        reply = json.loads(shim.act("start"))
        assert (reply["version"], reply["protocol"]) == (2, "ttrpc")
        shim.connect()

        await shim.call(
            "Create",
            bundle=str(shim.bundle),
            rootfs=[{"type": "bind", "source": str(rootfs), "options": ["rbind", "rw"]}],
            stdout=str(outputs["stdout"]),
            stderr=str(outputs["stderr"]),
        )
        started = await shim.call("Start")
        os.kill(started.pid, 0)
        waited = await shim.call("Wait")
        assert waited.exit_status == 42
        state = await shim.call("State")
        assert (state.status, state.exit_status) == (STOPPED, 42)
        deleted = await shim.call("Delete")
        assert (deleted.exit_status, deleted.pid) == (42, started.pid)
        assert deleted.exited_at == waited.exited_at
        await shim.call("Shutdown")
        assert os.read(readers["stdout"], 65536).decode().strip() != os.uname().release
        assert os.read(readers["stderr"], 65536) == b"problem\n"

        await asyncio.to_thread(wait_until_only, one_stack.containerd.nursery, before)
        assert events.topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
        response = task_v3_pb2.DeleteResponse.FromString(shim.act("delete", "-bundle", shim.bundle))
        assert response.exit_status == 128 + signal.SIGKILL
    finally:
        await shim.close()
        serving.cancel()
        await asyncio.wait([serving])
        listener.close()
        for reader in readers.values():
            os.close(reader)
        shutil.rmtree(place)

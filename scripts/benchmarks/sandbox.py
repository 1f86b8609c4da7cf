"""Drives one container without containerd, over its shim's ttrpc socket, under Hako and runc alike."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from google.protobuf import any_pb2
from google.protobuf.message_factory import GetMessageClass

from proto.containerd import task_v2_pb2
from scripts.benchmarks import inside
from scripts.benchmarks.stage import MeasurementError
from shim.errors import ShimError
from shim.transport.ttrpc_client import TtrpcClient
from tests.e2e.busybox import rootfs_archive
from tests.e2e.by_hand import CAPABILITY_SETS, PROCESS, PROCESS_TYPE
from tests.e2e.containerd import NAMESPACE, SHIM_DIRECTORY, SYSTEM_PATH
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.benchmarks.stage import Stage

CALL_TIMEOUT_S = patient(120.0)
COMMAND_TIMEOUT_S = patient(60.0)
TASK = task_v2_pb2.DESCRIPTOR.services_by_name["Task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A shim's executable."""

    name: str
    path: Path


HAKO = Program(name="Hako", path=SHIM_DIRECTORY / "containerd-shim-hako-v2")
RUNC = Program(name="runc", path=Path("/usr/bin/containerd-shim-runc-v2"))


class Sandbox:
    """A bundle whose container sleeps, and the steps that containerd would take with it.

    :param stage: the stage of the measurement.
    :param program: the shim.
    """

    def __init__(self, stage: Stage, program: Program) -> None:
        self.id = stage.new_id()
        self.program = program
        self._stage = stage
        self._others = frozenset(stage.processes())
        self._place = stage.home / f"{self.id}-place"
        self._bundle = self._place / self.id
        self._rootfs = self._place / "rootfs"
        self._client: TtrpcClient | None = None
        self._address = ""
        self._process = {**PROCESS, "capabilities": {kind: [] for kind in CAPABILITY_SETS}}
        (self._bundle / "rootfs").mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
            archive.extractall(self._rootfs, filter="fully_trusted")  # noqa: S202 - this program made the archive
        spec = {
            "ociVersion": "1.0.2",
            "process": {"args": ["sleep", "100000"], **self._process},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "cgroupsPath": f"/{NAMESPACE}/{self.id}",
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            },
        }
        (self._bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")
        os.mkfifo(self._bundle / "log", 0o700)
        # With a reader, a shim can open it at once; the pipe has room for everything that is logged.
        self._log = os.open(self._bundle / "log", os.O_RDWR | os.O_NONBLOCK)

    def __enter__(self) -> Self:
        """Return the sandbox; leaving the block ends it, in any state."""
        return self

    def __exit__(self, *_: object) -> None:
        """End everything that is left of it."""
        if self._client is not None:
            with contextlib.suppress(ShimError):
                self.call("Kill", signal=int(signal.SIGKILL), all=True)
                self.call("Wait")
                self.call("Delete")
            with contextlib.suppress(ShimError):
                self.call("Shutdown")
            self._stage.runner.run(self._client.aclose())
        if self.program is HAKO:
            self.delete()
        os.close(self._log)
        self._stage.wait_until_gone(but=self._others)

    def start(self) -> float:
        """Run the ``start`` command and connect to the shim.

        :returns: how long the command took, in seconds.
        :raises MeasurementError: if it fails.
        """
        took_s, output = self._act("start")
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(output.strip().removeprefix("unix://"))
        connection.settimeout(0)
        self._client = self._stage.runner.run(TtrpcClient.over(connection))
        return took_s

    def delete(self) -> float:
        """Run the ``delete`` command.

        :returns: how long it took, in seconds.
        :raises MeasurementError: if it fails.
        """
        took_s, _ = self._act("delete", "-bundle", self._bundle)
        return took_s

    def create(self) -> None:
        """Create the container and start its process."""
        rootfs = [{"type": "bind", "source": str(self._rootfs), "options": ["rbind", "rw"]}]
        self.call("Create", bundle=str(self._bundle), rootfs=rootfs)
        self.call("Start")

    def kill_everything(self) -> None:
        """Kill the shim and then the container's process, and wait until nothing of the sandbox runs."""
        pids = self.call("Connect")
        for pid in (pids.shim_pid, pids.task_pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._stage.wait_until_gone(but=self._others)
        assert self._client is not None  # noqa: S101 - just used
        self._stage.runner.run(self._client.aclose())
        self._client = None

    def call(self, name: str, **fields: Any) -> Any:
        """Call a method of the task service on the container."""
        return self._stage.runner.run(self._call(name, **fields))

    def states(self, count: int) -> list[float]:
        """Ask for the container's state again and again.

        :param count: how often.
        :returns: how long each call took, in seconds.
        """
        return self._stage.runner.run(self._states(count))

    def grpc_socket(self) -> Path:
        """Find the gRPC socket beside Hako's state."""
        return (self._bundle / "hako").readlink() / "grpc.sock"

    def vsock_socket(self) -> Path:
        """Find the socket through which the ports of Hako's guest are reached."""
        return inside.ports(self._bundle)

    def execute(
        self, exec_id: str, *command: str, stdin: Path | None = None, stdout: Path | None = None
    ) -> None:
        """Start an exec process that reads from a FIFO and writes to one."""
        document = json.dumps({"args": command, **self._process}).encode()
        spec = any_pb2.Any(type_url=PROCESS_TYPE, value=document)
        self.call("Exec", exec_id=exec_id, spec=spec, stdin=str(stdin or ""), stdout=str(stdout or ""))
        self.call("Start", exec_id=exec_id)

    def finish(self, exec_id: str) -> None:
        """Wait for an exec process and delete it.

        :raises MeasurementError: if it failed.
        """
        status = self.call("Wait", exec_id=exec_id).exit_status
        self.call("Delete", exec_id=exec_id)
        if status != 0:
            raise MeasurementError(f"exec: {exec_id}: exit status {status}")

    async def _call(self, name: str, **fields: Any) -> Any:
        assert self._client is not None  # noqa: S101 - a sandbox must be started first
        method = TASK.methods_by_name[name]
        request = GetMessageClass(method.input_type)(id=self.id, **fields)
        response = GetMessageClass(method.output_type)
        return await self._client.call(TASK.full_name, name, request, response, timeout_s=CALL_TIMEOUT_S)

    async def _states(self, count: int) -> list[float]:
        assert self._client is not None  # noqa: S101 - a sandbox is started first
        return await _timed_states(self._client, self.id, count)

    def _act(self, action: str, *flags: str | Path) -> tuple[float, str]:
        stage, output, errors = self._stage, self._place / action, self._place / f"{action}.err"
        output.write_bytes(b"")
        pid = stage.hako.nursery.spawn(
            [
                self.program.path,
                *("-namespace", NAMESPACE, "-id", self.id, "-address", stage.hako.address),
                *("-publish-binary", stage.hako.release.programs / "containerd"),
                *flags,
                action,
            ],
            environment={
                "PATH": SYSTEM_PATH,
                "HAKO_CONFIG": str(stage.config),
                "TTRPC_ADDRESS": f"{stage.hako.address}.ttrpc",
                "GRPC_ADDRESS": str(stage.hako.address),
            },
            directory=self._bundle,
            stdout=output,
            stderr=errors,
        )
        status = stage.hako.nursery.wait(pid, timeout_s=COMMAND_TIMEOUT_S)
        took_s = stage.hako.nursery.took_s[pid]
        if status != 0:
            raise MeasurementError(f"{self.program.name}: {action}: {errors.read_text(encoding='utf-8')}")
        return took_s, output.read_bytes().decode(errors="replace")


def states(stage: Stage, name: str, count: int) -> list[float]:
    """Ask for the state of a container that containerd has started, again and again.

    :param stage: where.
    :param name: its id.
    :param count: how often.
    :returns: how long each call took, in seconds.
    """
    bundle = stage.hako.state / "io.containerd.runtime.v2.task" / NAMESPACE / name
    address = (bundle / "address").read_text(encoding="utf-8")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address.removeprefix("unix://"))
    connection.settimeout(0)

    async def ask() -> list[float]:
        client = await TtrpcClient.over(connection)
        try:
            return await _timed_states(client, name, count)
        finally:
            await client.aclose()

    return stage.runner.run(ask())


async def _timed_states(client: TtrpcClient, name: str, count: int) -> list[float]:
    method = TASK.methods_by_name["State"]
    request = GetMessageClass(method.input_type)(id=name)
    response = GetMessageClass(method.output_type)
    took_s = []
    for _ in range(count):
        began_s = time.perf_counter()
        await client.call(TASK.full_name, "State", request, response, timeout_s=CALL_TIMEOUT_S)
        took_s.append(time.perf_counter() - began_s)
    return took_s


@contextlib.contextmanager
def running(stage: Stage, program: Program) -> Iterator[Sandbox]:
    """Keep a sandbox with a running container for a block."""
    with Sandbox(stage, program) as sandbox:
        sandbox.start()
        sandbox.create()
        yield sandbox

"""containerd's Task service, versions 2 and 3: their messages are the same on the wire."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.empty_pb2 import Empty

from proto.containerd import runc_options_pb2, task_types_pb2, task_v3_pb2
from shim.errors import InvalidArgument
from shim.identifiers import check_identifier
from shim.refusal import Refusal
from shim.sandbox.host_streams import Stdio
from shim.sandbox.process import Process, State
from shim.telemetry import timeline
from shim.telemetry.events import pack
from shim.telemetry.metrics import host_has_cgroup_v2, to_metrics
from shim.telemetry.timestamps import to_timestamp

if TYPE_CHECKING:
    from shim.sandbox.container import Container
    from shim.sandbox.containers import Containers
    from shim.sandbox.sandbox import Sandbox

_STATUS = {
    State.CREATED: task_types_pb2.CREATED,
    State.RUNNING: task_types_pb2.RUNNING,
    State.PAUSED: task_types_pb2.PAUSED,
    State.STOPPED: task_types_pb2.STOPPED,
    State.DELETED: task_types_pb2.STOPPED,
}


class TaskService:
    """Translates requests to the containers, and their answers to replies.

    :param sandbox: the machine of this shim.
    :param containers: its containers.
    """

    def __init__(self, sandbox: Sandbox, containers: Containers) -> None:
        self._sandbox = sandbox
        self._containers = containers

    async def create(self, request: task_v3_pb2.CreateTaskRequest) -> task_v3_pb2.CreateTaskResponse:
        """Create a container."""
        _check_identifier(request.id, phase="create", what="id")
        stdio = Stdio(
            stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal
        )
        with (
            self._sandbox.tracing.failures(request.id),
            timeline.phase("Create", lane=timeline.CONTAINERD),
            self._sandbox.counting.failures("create"),
        ):
            if request.checkpoint:
                raise InvalidArgument(
                    f"create: container {request.id}: restoring a checkpoint is not supported"
                )
            await self._containers.create(
                request.id, bundle=Path(request.bundle), rootfs=list(request.rootfs), stdio=stdio
            )
        return task_v3_pb2.CreateTaskResponse(pid=self._sandbox.pid)

    async def start(self, request: task_v3_pb2.StartRequest) -> task_v3_pb2.StartResponse:
        """Start a container's init, or an exec."""
        container = self._containers.get(request.id)
        if request.exec_id:
            with self._sandbox.counting.failures("exec"):
                await container.start_exec(request.exec_id)
        else:
            with (
                self._traced_once(container),
                timeline.phase("Start", lane=timeline.CONTAINERD),
                self._sandbox.counting.failures("start"),
            ):
                await container.start()
        return task_v3_pb2.StartResponse(pid=self._sandbox.pid)

    def _traced_once(self, container: Container) -> contextlib.AbstractContextManager[None]:
        """Have the trace of a start sent if it fails, unless the container has been started before."""
        if container.init.state is State.CREATED:
            return self._sandbox.tracing.failures(container.id)
        return contextlib.nullcontext()

    async def state(self, request: task_v3_pb2.StateRequest) -> task_v3_pb2.StateResponse:
        """Report the state that the shim knows, without asking the guest."""
        container = self._containers.get(request.id)
        process = container.process(request.exec_id)
        return task_v3_pb2.StateResponse(
            id=request.id,
            bundle=str(container.bundle),
            pid=self._pid_of(process),
            status=_STATUS[process.state],
            stdin=process.stdio.stdin,
            stdout=process.stdio.stdout,
            stderr=process.stdio.stderr,
            terminal=process.stdio.terminal,
            exit_status=process.exit_status,
            exited_at=to_timestamp(process.exited_at_s),
            exec_id=request.exec_id,
        )

    async def wait(self, request: task_v3_pb2.WaitRequest) -> task_v3_pb2.WaitResponse:
        """Block until a process has ended."""
        process = self._containers.get(request.id).process(request.exec_id)
        await process.exited.wait()
        return task_v3_pb2.WaitResponse(
            exit_status=process.exit_status, exited_at=to_timestamp(process.exited_at_s)
        )

    async def kill(self, request: task_v3_pb2.KillRequest) -> Empty:
        """Send a signal."""
        container = self._containers.get(request.id)
        process = container.process(request.exec_id)
        await container.kill(process, number=request.signal, everyone=request.all)
        return Empty()

    async def delete(self, request: task_v3_pb2.DeleteRequest) -> task_v3_pb2.DeleteResponse:
        """Forget a stopped process, and with init the whole container."""
        container = self._containers.get(request.id)
        process = container.process(request.exec_id)
        pid = self._pid_of(process)
        await self._containers.delete(request.id, exec_id=request.exec_id)
        return task_v3_pb2.DeleteResponse(
            pid=pid, exit_status=process.exit_status, exited_at=to_timestamp(process.exited_at_s)
        )

    async def pids(self, request: task_v3_pb2.PidsRequest) -> task_v3_pb2.PidsResponse:
        """List the live processes; on the host, each is represented by the machine's own process."""
        exec_ids = await self._containers.get(request.id).exec_ids_of_processes()
        pid = self._sandbox.pid
        processes = [task_types_pb2.ProcessInfo(pid=pid)]
        for exec_id in exec_ids:
            info = pack(runc_options_pb2.ProcessDetails(exec_id=exec_id)) if exec_id else None
            processes.append(task_types_pb2.ProcessInfo(pid=pid, info=info))
        return task_v3_pb2.PidsResponse(processes=processes)

    async def pause(self, request: task_v3_pb2.PauseRequest) -> Empty:
        """Freeze a container."""
        await self._containers.get(request.id).pause()
        return Empty()

    async def resume(self, request: task_v3_pb2.ResumeRequest) -> Empty:
        """Thaw a container."""
        await self._containers.get(request.id).resume()
        return Empty()

    async def update(self, request: task_v3_pb2.UpdateTaskRequest) -> Empty:
        """Change a container's limits."""
        container = self._containers.get(request.id)
        kind = request.resources.type_url.rpartition("/")[2]
        if kind != "LinuxResources":
            raise InvalidArgument(
                f"update: container {request.id}: resources of type {kind!r}; send LinuxResources"
            )
        resources = _json_object(request.resources.value, what=f"update: container {request.id}: resources")
        await container.update(resources)
        return Empty()

    async def stats(self, request: task_v3_pb2.StatsRequest) -> task_v3_pb2.StatsResponse:
        """Measure a container, in the message of the host's cgroup version."""
        stats = await self._containers.get(request.id).stats()
        return task_v3_pb2.StatsResponse(stats=pack(to_metrics(stats, unified=host_has_cgroup_v2())))

    async def exec(self, request: task_v3_pb2.ExecProcessRequest) -> Empty:
        """Register an exec; Start runs it."""
        container = self._containers.get(request.id)
        _check_identifier(request.exec_id, phase="exec", what="exec id")
        container.add_exec(
            request.exec_id,
            spec=_json_object(request.spec.value, what=f"exec {request.exec_id}: spec"),
            stdio=Stdio(
                stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal
            ),
        )
        return Empty()

    async def resize_pty(self, request: task_v3_pb2.ResizePtyRequest) -> Empty:
        """Set the size of a terminal."""
        container = self._containers.get(request.id)
        await container.resize(container.process(request.exec_id), request.width, request.height)
        return Empty()

    async def close_io(self, request: task_v3_pb2.CloseIORequest) -> Empty:
        """Let a process's stdin end once the client has closed its side."""
        process = self._containers.get(request.id).process(request.exec_id)
        if request.stdin and process.host_streams is not None:
            process.host_streams.close_stdin_writer()
        return Empty()

    async def connect(self, request: task_v3_pb2.ConnectRequest) -> task_v3_pb2.ConnectResponse:
        """Report the pids; an unknown container has pid 0."""
        pid = self._sandbox.pid if self._containers.has(request.id) else 0
        return task_v3_pb2.ConnectResponse(shim_pid=os.getpid(), task_pid=pid)

    async def shutdown(self, request: task_v3_pb2.ShutdownRequest) -> Empty:  # noqa: ARG002 - a shim has only one sandbox
        """End the shim, unless containers are left or containerd's sandbox service uses it."""
        self._containers.shut_down()
        return Empty()

    def _pid_of(self, process: Process) -> int:
        # An exec has no pid before it runs; clients read a non-zero pid as "started".
        if process.exec_id and process.state is State.CREATED:
            return 0
        return self._sandbox.pid


def _check_identifier(identifier: str, *, phase: str, what: str) -> None:
    # An id becomes part of paths, in the share and in the guest.
    try:
        check_identifier(identifier, phase=phase, what=what)
    except Refusal as refusal:
        raise InvalidArgument(str(refusal)) from refusal


def _json_object(value: bytes, *, what: str) -> dict[str, Any]:
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what}: not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise InvalidArgument(f"{what}: not a JSON object")
    return decoded

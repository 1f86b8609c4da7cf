"""The events about a task for containerd, as topic and message. Pure.

Topics and messages follow containerd's runtime v2 README; the caller decides their order for each container.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.containerd import events_pb2
from shim.telemetry.timestamps import to_timestamp

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from google.protobuf.message import Message

    from proto.containerd.types_pb2 import Mount
    from shim.sandbox.process import Process

    Event = tuple[str, Message]


def created(init: Process, *, bundle: Path, rootfs: Iterable[Mount], pid: int) -> Event:
    """Report that a container waits to be started."""
    stdio = init.stdio
    return "/tasks/create", events_pb2.TaskCreate(
        container_id=init.container_id,
        bundle=str(bundle),
        rootfs=rootfs,
        io=events_pb2.TaskIO(
            stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, terminal=stdio.terminal
        ),
        pid=pid,
    )


def started(container_id: str, *, pid: int) -> Event:
    """Report that a container's init runs."""
    return "/tasks/start", events_pb2.TaskStart(container_id=container_id, pid=pid)


def exec_added(process: Process) -> Event:
    """Report that an exec is registered."""
    return "/tasks/exec-added", events_pb2.TaskExecAdded(
        container_id=process.container_id, exec_id=process.exec_id
    )


def exec_started(process: Process, *, pid: int) -> Event:
    """Report that an exec runs."""
    return "/tasks/exec-started", events_pb2.TaskExecStarted(
        container_id=process.container_id, exec_id=process.exec_id, pid=pid
    )


def paused(container_id: str) -> Event:
    """Report that a container is frozen."""
    return "/tasks/paused", events_pb2.TaskPaused(container_id=container_id)


def resumed(container_id: str) -> Event:
    """Report that a frozen container continues."""
    return "/tasks/resumed", events_pb2.TaskResumed(container_id=container_id)


def out_of_memory(container_id: str) -> Event:
    """Report that the kernel killed a process of a container for memory."""
    return "/tasks/oom", events_pb2.TaskOOM(container_id=container_id)


def exited(process: Process, *, pid: int) -> Event:
    """Report that a process has ended."""
    return "/tasks/exit", events_pb2.TaskExit(
        container_id=process.container_id,
        id=process.event_id,
        pid=pid,
        exit_status=process.exit_status,
        exited_at=to_timestamp(process.exited_at_s),
    )


def deleted(init: Process, *, pid: int) -> Event:
    """Report that a container was deleted."""
    return "/tasks/delete", events_pb2.TaskDelete(
        container_id=init.container_id,
        pid=pid,
        exit_status=init.exit_status,
        exited_at=to_timestamp(init.exited_at_s),
    )

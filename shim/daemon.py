"""The shim's long-lived process: it serves one sandbox over ttrpc and gRPC until the sandbox is empty."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from proto.containerd import sandbox_v1_pb2, task_v2_pb2, task_v3_pb2
from proto.hako import metrics_pb2
from shim.config import ConfigText, parse
from shim.errors import ShimError
from shim.host import mounts, releases, state_directory
from shim.host.ledger import Ledger
from shim.machine import pod
from shim.machine.machine import Machine
from shim.sandbox.bundle import read_spec, wait_for_spec
from shim.sandbox.containers import Containers
from shim.sandbox.context import Context
from shim.sandbox.sandbox import Sandbox
from shim.sandbox.shared_volumes import SharedVolumes
from shim.sandbox.work import Work
from shim.services.metrics import MetricsService
from shim.services.sandbox import SandboxService
from shim.services.task import TaskService
from shim.telemetry import latency, timeline
from shim.telemetry.events import Publisher
from shim.telemetry.log import configure
from shim.transport.dispatch import Dispatch
from shim.transport.grpc_on_demand import serve_grpc_on_demand
from shim.transport.ttrpc_server import TtrpcServer
from shim.version import version

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.descriptor import ServiceDescriptor

    from shim.config import Config
    from shim.host.state_directory import StartRecord
    from shim.machine.pod import PodSpec
    from shim.telemetry.trace_export import TraceExport
    from shim.transport.dispatch import Heed

log = logging.getLogger(__name__)

MANAGEMENT = "hako.management.v1.Management"
REPLIES_TIMEOUT_S = 3.0  # for answers in flight at the end; no new request is accepted then
EVENTS_TIMEOUT_S = 5.0  # containerd's own shims wait as long for the last events
UNDO_TIMEOUT_S = 3.0  # for killed processes to be gone; below containerd's 5 s for `delete`


def run(record: StartRecord, socket_descriptor: int | None, ready: Callable[[], None]) -> None:
    """Serve one sandbox until containerd shuts it down, then leave nothing behind.

    :param record: how the shim was started.
    :param socket_descriptor: the listening ttrpc socket; none if containerd speaks gRPC.
    :param ready: called once every socket that containerd needs is listening.
    """
    with timeline.phase("configuration, mount namespace", lane=timeline.SHIM):
        settings = parse(ConfigText(text=record.config_text, source=record.config_source))
        level = "debug" if record.debug else settings.shim.log_level
        configure(level, kept_in=Path(record.state_directory))
        host_mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)  # for hooks to run in
        mounts.enter_private_namespace()
    listener = None if socket_descriptor is None else socket.socket(fileno=socket_descriptor)
    try:
        asyncio.run(_serve(record, settings, listener=listener, host_mounts=host_mounts, ready=ready))
    finally:
        _undo(record)
        releases.leave()


async def _serve(
    record: StartRecord,
    config: Config,
    *,
    listener: socket.socket | None,
    host_mounts: int,
    ready: Callable[[], None],
) -> None:
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    publisher = Publisher(record.ttrpc_address, namespace=record.namespace)
    ledger = Ledger(record.state_directory)
    try:
        async with asyncio.TaskGroup() as group:
            publishing = group.create_task(publisher.run(), name="events")
            context = Context(
                record=record,
                config=config,
                ledger=ledger,
                publisher=publisher,
                work=Work(group),
                leave=over.set,
                host_mounts=host_mounts,
                traces=_traces(record, config),
            )
            machine = Machine(record.id, directory=context.directory, config=config, ledger=ledger)
            sandbox = Sandbox(context, machine)
            containers = Containers(context, sandbox, SharedVolumes.of(machine, work=context.work))
            found = await _pod_of(Path(record.bundle), record.id)
            if found is not None:  # otherwise CreateSandbox describes it
                sandbox.start(found)
            management = partial(_management, context, machine, sandbox, containers, over)
            metrics = MetricsService(sandbox, containers, machine)
            dispatch = _dispatch(sandbox, containers, metrics, management=management)
            heed = context.traces.contexts.heed if context.traces else None
            await _serve_until(over, dispatch, record, listener=listener, ready=ready, heed=heed)
            await containers.stop()
            await publisher.drain(timeout_s=EVENTS_TIMEOUT_S)
            publishing.cancel()
    finally:
        ledger.close()


async def _pod_of(bundle: Path, sandbox_id: str) -> PodSpec | None:
    """Describe the pod by the specification in the bundle that the shim was started in, if there is one."""
    if not (bundle / "config.json").exists():
        return None
    try:
        await wait_for_spec(bundle, phase="start")
        return pod.from_oci(read_spec(bundle), sandbox_id=sandbox_id)
    except ShimError:  # Create reports the error
        return pod.from_oci({})


def _dispatch(
    sandbox: Sandbox,
    containers: Containers,
    metrics: MetricsService,
    *,
    management: Callable[[], tuple[ServiceDescriptor, object]],
) -> Dispatch:
    task = TaskService(sandbox, containers)
    return Dispatch(
        [
            (task_v3_pb2.DESCRIPTOR.services_by_name["Task"], task),
            (task_v2_pb2.DESCRIPTOR.services_by_name["Task"], task),
            (
                sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"],
                SandboxService(sandbox, containers),
            ),
            (metrics_pb2.DESCRIPTOR.services_by_name["Metrics"], metrics),
        ],
        late={MANAGEMENT: management},
        observe=latency.SHIM.observe,
    )


def _traces(record: StartRecord, config: Config) -> TraceExport | None:
    endpoint = config.shim.tracing_endpoint
    if not endpoint:
        return None
    from shim.telemetry.trace_export import TraceExport  # noqa: PLC0415 - few hosts send traces

    return TraceExport(endpoint, state=Path(record.state_directory), log_dir=Path(config.shim.log_dir))


def _management(
    context: Context, machine: Machine, sandbox: Sandbox, containers: Containers, over: asyncio.Event
) -> tuple[ServiceDescriptor, object]:
    """Make the services for operators' tools."""
    from shim.services import management  # noqa: PLC0415 - only these services need it, and a zygote has imported it

    service = management.ManagementService(
        context.record,
        machine=machine,
        sandbox=sandbox,
        containers=containers,
        feed=context.publisher.feed,
        over=over,
        allows_exec=context.config.guest.debug,
    )
    return management.SERVICE, service


async def _serve_until(
    over: asyncio.Event,
    dispatch: Dispatch,
    record: StartRecord,
    *,
    listener: socket.socket | None,
    ready: Callable[[], None],
    heed: Heed | None,
) -> None:
    """Serve on every socket until ``over`` is set and the answers in flight are sent."""
    server = TtrpcServer(dispatch, heed=heed)
    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        if listener is not None:
            group.create_task(server.serve(listener), name="ttrpc")
        with timeline.phase("gRPC", lane=timeline.SHIM):
            for_tools = Path(record.state_directory) / "grpc.sock"
            await stack.enter_async_context(serve_grpc_on_demand(dispatch, for_tools, heed=heed))
            if listener is None:
                # Importing grpc takes longer than the rest of the start.
                from shim.transport.grpc_server import serve_grpc  # noqa: PLC0415

                await stack.enter_async_context(serve_grpc(dispatch, Path(record.socket_path), heed=heed))
        ready()
        version()  # before another one can be installed
        await over.wait()
        if listener is not None:
            await server.drain(REPLIES_TIMEOUT_S)


def _undo(record: StartRecord) -> None:
    """Undo the remains, unless ``delete`` has done that or a waiting ``start`` will."""
    held = state_directory.lock_existing(record.state_directory, wait=False)
    if held is None:
        return
    ledger = Ledger(record.state_directory)
    for failure in ledger.undo_all(deadline_s=UNDO_TIMEOUT_S):
        log.error("end: %s", failure)
    ledger.close()
    os.close(held)

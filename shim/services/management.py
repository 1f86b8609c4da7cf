"""The service for operators' tools; see ``proto/hako/management.proto``.

A sandbox does not need it, so it is made at its first request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, TypeVar

from proto.hako import management_pb2 as api
from shim.annotations import CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID
from shim.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ShimError,
    Unimplemented,
)
from shim.host import process_usage
from shim.sandbox.guest_container import GuestContainer
from shim.services import guest_shell
from shim.telemetry import log, timeline_files
from shim.version import version

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from google.protobuf.descriptor import ServiceDescriptor

    from shim.host.state_directory import StartRecord
    from shim.machine.machine import Machine
    from shim.machine.running import RunningMachine
    from shim.sandbox.container import Container
    from shim.sandbox.containers import Containers
    from shim.sandbox.sandbox import Sandbox
    from shim.telemetry.event_feed import EventFeed

SERVICE: ServiceDescriptor = api.DESCRIPTOR.services_by_name["Management"]
SHIM = "shim"
logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_NS_PER_S = 10**9


class ManagementService:
    """Translates the shim's knowledge of its sandbox to replies.

    :param record: how the shim was started.
    :param machine: the machine of this shim.
    :param sandbox: its life.
    :param containers: what is in it.
    :param feed: what happens in it.
    :param over: set when the shim is to end; streams end then.
    :param allows_exec: whether the operator allows commands in the guest.
    """

    def __init__(
        self,
        record: StartRecord,
        *,
        machine: Machine,
        sandbox: Sandbox,
        containers: Containers,
        feed: EventFeed,
        over: asyncio.Event,
        allows_exec: bool,
    ) -> None:
        self._record = record
        self._machine = machine
        self._sandbox = sandbox
        self._containers = containers
        self._feed = feed
        self._over = over
        self._allows_exec = allows_exec

    async def describe(self, request: api.DescribeRequest) -> api.DescribeResponse:  # noqa: ARG002 - it is empty
        """Describe the sandbox without asking the guest."""
        sandbox, record = self._sandbox, self._record
        response = api.DescribeResponse(
            id=sandbox.id,
            namespace=sandbox.namespace,
            version=version(),
            state=self._containers.parking.condition,
            reason=sandbox.reason_of_end,
            created_at_s=sandbox.created_at_s,
            processes=[api.HostProcess(name=name, pid=pid) for name, pid in self._processes()],
            containers=[_container(one) for one in self._containers.all.values()],
            state_directory=record.state_directory,
            config_source=record.config_source,
            protocol=record.protocol,
        )
        annotations = self._annotations()
        if POD_NAME in annotations:
            response.pod.CopyFrom(
                api.Pod(
                    name=annotations[POD_NAME],
                    namespace=annotations.get(POD_NAMESPACE, ""),
                    uid=annotations.get(POD_UID, ""),
                )
            )
        if sandbox.is_ready:
            running = await sandbox.running(awake=False)
            response.machine.CopyFrom(_machine(running))
            response.interfaces.extend(_interfaces(running))
        return response

    async def usage(self, request: api.UsageRequest) -> api.UsageResponse:
        """Measure the sandbox's processes, and its containers if the guest answers in time."""
        response = api.UsageResponse()
        for name, pid in self._processes():
            try:
                used = process_usage.measure(pid)
            except OSError:  # it has just ended
                continue
            response.processes.add(
                name=name,
                pid=pid,
                memory_bytes=used.memory_bytes,
                resident_bytes=used.resident_bytes,
                cpu_s=used.cpu_s,
            )
        if request.guest_timeout_s > 0:
            try:
                async with asyncio.timeout(request.guest_timeout_s):
                    response.containers.extend(await self._guest_usage(request.guest_timeout_s))
            except (TimeoutError, DeadlineExceeded):
                response.problem = f"the guest did not answer within {request.guest_timeout_s:g} s"
            except ShimError as error:
                response.problem = str(error)
        return response

    async def park(self, request: api.ParkRequest) -> api.ParkResponse:  # noqa: ARG002 - it is empty
        """Pause the containers, and move the machine's memory to a file."""
        machine = await self._containers.parking.park()
        return api.ParkResponse(memory_bytes=machine.parking.memory_bytes)

    async def unpark(self, request: api.UnparkRequest) -> api.UnparkResponse:  # noqa: ARG002 - it is empty
        """Move the memory back, and resume the containers."""
        await self._containers.parking.unpark()
        return api.UnparkResponse()

    async def timeline(self, request: api.TimelineRequest) -> api.TimelineResponse:  # noqa: ARG002 - it is empty
        """Tell the phases of the starts so far."""
        self._sandbox.timeline.write()
        try:
            found = timeline_files.of_running(self._sandbox.directory, title=self._sandbox.id)
        except OSError as error:
            raise NotFound(f"timeline: sandbox {self._sandbox.id}: there is none yet; try again") from error
        return api.TimelineResponse(
            phases=[
                api.Phase(lane=each.lane, name=each.name, began_s=each.began_s, ended_s=each.ended_s)
                for each in found.phases
            ]
        )

    async def log_sources(self, request: api.LogSourcesRequest) -> api.LogSourcesResponse:  # noqa: ARG002 - it is empty
        """Name the files with log lines."""
        found = log.files(self._sandbox.directory)
        return api.LogSourcesResponse(
            sources=[
                api.LogSource(kind=kind, path=str(path)) for kind, path in found.items() if path.exists()
            ]
        )

    async def events(self, requests: AsyncIterator[api.EventsRequest]) -> AsyncIterator[api.Event]:
        """Yield the kept events, and on request each new one."""
        request = await anext(requests, api.EventsRequest())
        events = self._feed.events(follow=request.follow)
        async with contextlib.aclosing(self._until_over(events)) as told:
            async for event in told:
                yield api.Event(
                    number=event.number,
                    at_s=event.at_s,
                    topic=event.topic,
                    container_id=event.container_id,
                    exec_id=event.exec_id,
                    exit_status=event.exit_status,
                    text=event.text,
                )

    async def exec(self, requests: AsyncIterator[api.ExecRequest]) -> AsyncIterator[api.ExecResponse]:
        """Run a command in the guest, and carry its streams."""
        request = await anext(requests, api.ExecRequest())
        if not self._allows_exec:
            raise FailedPrecondition(
                "exec: commands in guests are not allowed on this host; set [guest] debug = true, which "
                "counts for sandboxes that start after that"
            )
        if request.WhichOneof("said") != "start":
            raise InvalidArgument("exec: the first message starts nothing; send a start")
        agent = await self._sandbox.agent()
        if not agent.processes.run_in_guest:
            raise Unimplemented("exec: the guest's agent has no shell; use Hako's image")
        logger.warning("exec: a command in the guest: %s", " ".join(request.start.args) or "a shell")
        answers = guest_shell.converse(agent, request.start, requests)
        async with contextlib.aclosing(self._until_over(answers)) as told:
            async for answer in told:
                yield answer

    async def _until_over(self, items: AsyncGenerator[_T, None]) -> AsyncGenerator[_T, None]:
        """Yield what an asynchronous generator yields, until the shim should end."""
        over = asyncio.ensure_future(self._over.wait())
        following: asyncio.Future[_T | None] | None = None
        try:
            while True:
                following = asyncio.ensure_future(anext(items, None))
                await asyncio.wait({following, over}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done() or (item := following.result()) is None:
                    return
                yield item
        finally:
            over.cancel()
            if following is not None:
                following.cancel()
                await asyncio.wait({following})
            await items.aclose()

    def _processes(self) -> list[tuple[str, int]]:
        return [(SHIM, os.getpid()), *((each.name, each.pid) for each in self._machine.processes())]

    def _annotations(self) -> Mapping[str, str]:
        """Return the annotations that name the pod: its own, or those of one of its containers."""
        candidates = (self._sandbox.pod.oci, *(one.spec for one in self._containers.all.values()))
        for spec in candidates:
            annotations = spec.get("annotations")
            if isinstance(annotations, dict) and POD_NAME in annotations:
                return annotations
        return {}

    async def _guest_usage(self, timeout_s: float) -> list[api.ContainerUsage]:
        guests = [one for one in self._containers.all.values() if isinstance(one, GuestContainer)]
        measured = await asyncio.gather(*(_usage(one, timeout_s) for one in guests))
        return [one for one in measured if one is not None]


async def _usage(container: GuestContainer, timeout_s: float) -> api.ContainerUsage | None:
    """Measure one container; one that has ended uses nothing."""
    if container.init.exited.is_set():
        return None
    try:
        cgroup = (await container.stats(timeout_s=timeout_s)).cgroup_stats
    except NotFound:
        return None
    return api.ContainerUsage(
        id=container.id,
        memory_bytes=cgroup.memory_stats.usage.usage,
        cpu_s=cgroup.cpu_stats.cpu_usage.total_usage / _NS_PER_S,
        processes=cgroup.pids_stats.current,
    )


def _machine(running: RunningMachine) -> api.Machine:
    spec, size = running.spec, running.size
    return api.Machine(
        vcpus=size.vcpus,
        max_vcpus=spec.max_vcpus,
        memory_bytes=size.memory_bytes,
        max_memory_bytes=spec.max_memory_bytes,
        accelerator=spec.accelerator.value,
        channel=spec.channel.value,
        template_key=running.template_key,
        agent_is_hako=running.agent.is_hako,
        user_id=spec.jail.uid if spec.jail else 0,
        parked_bytes=running.parking.memory_bytes,
    )


def _interfaces(running: RunningMachine) -> list[api.Interface]:
    return [
        api.Interface(
            name=each.name,
            kind=each.kind,
            mac=each.mac,
            mtu=each.mtu,
            addresses=[str(address.interface) for address in each.addresses],
        )
        for each in running.endpoints
    ]


def _container(container: Container) -> api.Container:
    annotations = container.spec.get("annotations")
    linux = container.spec.get("linux")
    init = container.init
    return api.Container(
        id=container.id,
        name=_text(annotations, CONTAINER_NAME),
        kind="guest" if isinstance(container, GuestContainer) else "pause",
        state=init.state.value,
        exit_status=init.exit_status,
        exited_at_s=init.exited_at_s or 0.0,
        bundle=str(container.bundle),
        execs=[
            api.Exec(id=name, state=each.state.value, exit_status=each.exit_status)
            for name, each in container.execs.items()
        ],
        volumes=[
            api.Volume(
                destination=_text(mount, "destination"),
                type=_text(mount, "type"),
                source=_text(mount, "source"),
                options=[str(option) for option in mount.get("options") or []],
            )
            for mount in container.spec.get("mounts") or []
        ],
        devices=[
            _text(device, "path")
            for device in (linux.get("devices") or [] if isinstance(linux, dict) else [])
        ],
    )


def _text(values: Any, name: str) -> str:
    """Return a text of a specification; other values count as empty."""
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, str) else ""

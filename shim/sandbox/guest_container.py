"""A container that runs in the guest, with its files and processes.

One task for each process follows its streams and its exit, and ends after both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from proto.kata import agent_pb2
from shim.agent.connection import CALL_TIMEOUT_S
from shim.agent.container_calls import REMOVE_TIMEOUT_S, STATS_TIMEOUT_S
from shim.agent.oci import translate, translate_resources
from shim.agent.oci_disks import root_disk
from shim.agent.oci_fields import refusing_malformed
from shim.agent.oci_process import translate_exec
from shim.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    ShimError,
    Unavailable,
)
from shim.host.host_process import STATUS_KILLED
from shim.machine.limits import limits_of
from shim.override import override
from shim.sandbox import killing, task_events
from shim.sandbox.container import Container
from shim.sandbox.files import ContainerFiles
from shim.sandbox.host_streams import open_host_streams
from shim.sandbox.inheritance import handed_down
from shim.sandbox.process import Input, Process, State
from shim.sandbox.stream_copying import StreamCopier
from shim.telemetry import timeline

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from proto.containerd.types_pb2 import Mount
    from shim.agent.client import Agent
    from shim.agent.guest_streams import GuestStreams
    from shim.sandbox.container import Siblings
    from shim.sandbox.hooks import Hooks
    from shim.sandbox.host_streams import Stdio
    from shim.sandbox.sandbox import Sandbox
    from shim.sandbox.shared_volumes import SharedVolumes

log = logging.getLogger(__name__)

SETTLED_S = 1.0  # a process that is silent for so long may never write anything
_DRAWN = f"{timeline.ENVIRONMENT_VARIABLE}=1"
STATUS_UNKNOWN = 255  # containerd's own value for an exit status that is not known
MACHINE_END_TIMEOUT_S = 10.0  # for the machine to end after its agent has gone
EXECS_GONE_TIMEOUT_S = 5.0  # the kernel ends them with their pid namespace; only the report takes time


class GuestContainer(Container):
    """A container with processes in the guest.

    :param container_id: containerd's id.
    :param bundle: the bundle directory.
    :param spec: the decoded ``config.json``.
    :param stdio: init's stream paths.
    :param sandbox: the machine that it runs in.
    :param siblings: all containers of the sandbox.
    :param hooks: programs of the host that its specification names.
    :param volumes: the host's files that containers share.
    """

    def __init__(
        self,
        container_id: str,
        *,
        bundle: Path,
        spec: dict[str, Any],
        stdio: Stdio,
        sandbox: Sandbox,
        siblings: Siblings,
        hooks: Hooks,
        volumes: SharedVolumes,
    ) -> None:
        super().__init__(
            container_id,
            bundle=bundle,
            spec=spec,
            stdio=stdio,
            sandbox=sandbox,
            siblings=siblings,
            hooks=hooks,
        )
        self.limits = limits_of(spec)
        self._volumes = volumes
        self._files = ContainerFiles(
            container_id, bundle=bundle, entries=volumes.entries, followed=volumes.followed
        )
        self._ending = False
        #: The last answers of the guest, for as long as it cannot be asked.
        self._last_stats: agent_pb2.StatsContainerResponse | None = None
        self._last_exec_ids: list[str] = []
        #: How long Create took, and both Create and Start.
        self._created_in_s = self._started_in_s = 0.0

    @override
    async def _bring_up(self, rootfs: Iterable[Mount]) -> None:
        """Share the file systems, create the container in the guest, and follow its init."""
        lane = timeline.container_lane(self.id)
        asked_at_s = time.monotonic()
        try:
            disk = root_disk(rootfs)
            with timeline.phase("mounts", lane=lane):
                if disk is None:
                    self._files.show_root(self.spec, rootfs)
            with timeline.phase("wait for the machine", lane=lane):
                running = await self._sandbox.running()
                agent = running.agent
            began_s = time.monotonic()
            spec = await self._volumes.memory.serve(self._sandbox.complete(self.spec), user=self, agent=agent)
            translation = translate(
                await self._files.mount(spec),
                container_id=self.id,
                sandbox_id=self._sandbox.id,
                terminal=self.init.stdio.terminal,
                seccomp=agent.supports_seccomp,
                inheritance=handed_down(agent),
            )
            if disk is not None:
                await self._files.plug_root(disk, vm=running.vm)
            for device in translation.disks:
                await self._files.plug(device, vm=running.vm)
            for group in translation.vfio_groups:
                await self._files.plug_group(group, vm=running.vm)
            await self._files.show_volumes(translation, agent=agent)
            timeline.note("volumes, devices", lane=lane, began_s=began_s, ended_s=time.monotonic())
            with timeline.phase("streams", lane=lane):
                guest_streams = await self._open_streams(self.init)
            request = agent_pb2.CreateContainerRequest(
                container_id=self.init.agent_id,
                exec_id=self.init.agent_id,
                OCI=translation.spec,
                sandbox_pidns=translation.sandbox_pidns,
            )
            guest_streams.announce(request)
            self._files.announce(request)
            with timeline.phase("grow", lane=lane):
                await self._siblings.grow()
            async with running.turn(lane=lane):
                with timeline.phase("CreateContainer", lane=lane):
                    await agent.containers.create(request)
            with timeline.phase("hooks", lane=lane):
                await self._run_hooks()
        except BaseException:
            self.init.close_streams()
            await self._files.take_back()
            raise
        self._created_in_s = time.monotonic() - asked_at_s
        self._follow(self.init, agent)

    async def _run_hooks(self) -> None:
        """Run the hooks that may prevent the container; if one fails, remove the container."""
        try:
            await self._hooks.created(pid=self._sandbox.pid)
        except BaseException:
            await self._remove()
            raise

    @override
    async def _run(self) -> None:
        agent = await self._sandbox.agent()
        lane = timeline.container_lane(self.id)
        with timeline.phase("network", lane=lane):
            await self._sandbox.make_ready()
        with timeline.phase("StartContainer", lane=lane):
            began_s = time.monotonic()
            await agent.containers.start(self.init.agent_id)
        self._started_in_s = self._created_in_s + time.monotonic() - began_s
        self._sandbox.work.spawn(self._conclude_start(), name=f"timeline of {self.id}")

    async def _conclude_start(self) -> None:
        """Record the phases once there is output or there will be none. No request waits for it."""
        self._sandbox.timeline.write()
        self._sandbox.counting.container_started(self._started_in_s)
        ends = [asyncio.ensure_future(event.wait()) for event in (self.init.heard, self.init.ended)]
        await asyncio.wait(ends, timeout=SETTLED_S, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        is_drawn = _DRAWN in self.spec.get("process", {}).get("env", ())
        await self._sandbox.keep_timeline(self.id, drawn=is_drawn)

    @override
    async def _freeze(self) -> None:
        await (await self._sandbox.agent()).containers.pause(self.init.agent_id)

    @override
    async def _thaw(self) -> None:
        await (await self._sandbox.agent()).containers.resume(self.init.agent_id)

    @override
    async def update(self, resources: dict[str, Any]) -> None:
        """Change the container's limits and resize the machine, which is never smaller than the limits.

        :param resources: as ``linux.resources`` of an OCI specification; limits that it does not mention
            stay.
        :raises InvalidArgument: if they are malformed, or one of them is refused.
        :raises ResourceExhausted: if the machine cannot be made large enough.
        :raises FailedPrecondition: if it has ended.
        """
        if self.init.exited.is_set():
            raise FailedPrecondition(f"update: container {self.id}: it is {self.init.state.value}")
        agent = await self._sandbox.agent()
        with refusing_malformed("resources"):
            request = translate_resources(self._files.without_disk_limits(resources))
            await self._files.limit_disks(resources)
        await self._files.follow_sizes(agent)
        limits = self.limits
        try:
            self.limits = limits.or_more(limits.updated(resources))
            await self._siblings.grow()
            await agent.containers.update(self.init.agent_id, request, unified=resources.get("unified") or {})
            limits = limits.updated(resources)
        finally:
            self.limits = limits
        await self._siblings.shrink()

    @override
    async def stats(self, *, timeout_s: float = STATS_TIMEOUT_S) -> agent_pb2.StatsContainerResponse:
        """Measure the container.

        :param timeout_s: how long the guest may take.
        :raises NotFound: if it has ended.
        :raises DeadlineExceeded: if the guest does not answer in time.
        """
        self._require_alive_for("stats")
        machine = await self._sandbox.running(awake=False)
        if self._last_stats is None or machine.parking.is_awake:
            self._last_stats = await machine.agent.containers.stats(self.init.agent_id, timeout_s=timeout_s)
        return self._last_stats

    @override
    async def exec_ids_of_processes(self) -> list[str]:
        """List every process except init by the id of its exec; a child of another process has an empty id.

        :raises NotFound: if the container has ended.
        """
        self._require_alive_for("pids")
        running = {p.agent_id: p.exec_id for p in self.execs.values() if p.state is State.RUNNING}
        try:
            machine = await self._sandbox.running(awake=False)
            if machine.parking.is_awake:
                self._last_exec_ids = await machine.agent.containers.exec_ids(self.init.agent_id)
            _init, *others = self._last_exec_ids
        except (ShimError, ValueError) as error:  # a stock agent, a hung guest, or none left
            log.debug("pids: container %s: asking the guest: %s", self.id, error)
            return list(running.values())
        return [running.get(agent_id, "") for agent_id in others]

    async def remember(self) -> None:
        """Ask the guest what will be asked for while it is parked."""
        if not self.init.exited.is_set():
            with contextlib.suppress(ShimError):  # then it is not known
                await self.stats()
            await self.exec_ids_of_processes()

    @override
    def add_exec(self, exec_id: str, *, spec: dict[str, Any], stdio: Stdio) -> None:
        """Register an exec; it runs on :meth:`start_exec`.

        :raises AlreadyExists: if the id is taken.
        :raises FailedPrecondition: if init has ended.
        """
        self._require_alive(exec_id)
        if exec_id in self.execs:
            raise AlreadyExists(f"exec {exec_id} of {self.id}: already exists")
        process = self.execs[exec_id] = Process(self.id, exec_id=exec_id, stdio=stdio, spec=spec)
        self._sandbox.publish(*task_events.exec_added(process))

    @override
    async def start_exec(self, exec_id: str) -> None:
        """Run a registered exec; if the guest refuses it, it stays created and can be deleted.

        :raises NotFound: if there is no such exec.
        :raises FailedPrecondition: if it ran already, or init has ended.
        """
        process = self.process(exec_id)
        self._require_alive(exec_id)
        process.require(Input.START)
        if process.starting:
            raise FailedPrecondition(f"start: {process}: it is being started")
        process.starting = True
        try:
            await self._start_exec(process)
        finally:
            process.starting = False

    async def _start_exec(self, process: Process) -> None:
        agent = await self._sandbox.agent()
        try:
            guest_streams = await self._open_streams(process)
            request = agent_pb2.ExecProcessRequest(
                container_id=self.init.agent_id,
                exec_id=process.agent_id,
                process=translate_exec(process, of=self.spec, inheritance=handed_down(agent)),
            )
            guest_streams.announce(request)
            await agent.processes.execute(request)
            process.apply(Input.START)
        except BaseException:
            process.close_streams()
            raise
        self._sandbox.publish(*task_events.exec_started(process, pid=self._sandbox.pid))
        self._follow(process, agent)
        if process.terminal_size is not None:
            await self.resize(process, *process.terminal_size)

    @override
    async def resize(self, process: Process, width: int, height: int) -> None:
        """Set a terminal's size; it is kept until the process runs, and ignored without a terminal."""
        if not process.stdio.terminal or process.exited.is_set():
            return
        process.terminal_size = (width, height)
        if process.exec_id and process.state is State.CREATED:
            return
        agent = await self._sandbox.agent()
        await agent.processes.resize_terminal(
            self.init.agent_id, exec_id=process.agent_id, rows=height, columns=width
        )

    @override
    async def kill(self, process: Process, *, number: int, everyone: bool) -> None:
        """Send a signal to one process, or to all of the container; see :func:`shim.sandbox.killing.kill`."""
        await killing.kill(
            process,
            container=self.init.agent_id,
            number=number,
            everyone=everyone,
            sandbox=self._sandbox,
            is_shared=lambda: self._siblings.has_other_uses(self.id),
            wake=lambda: self._siblings.parking.release(self),
        )

    def _require_alive(self, exec_id: str) -> None:
        if self._ending or self.init.state is not State.RUNNING:
            raise FailedPrecondition(
                f"exec {exec_id} of {self.id}: the container is {self.init.state.value}, not running"
            )

    async def _open_streams(self, process: Process) -> GuestStreams:
        """Open both ends of a process's streams."""
        process.host_streams = await open_host_streams(
            process.stdio, container_id=self.id, namespace=self._sandbox.namespace
        )
        running = await self._sandbox.running()
        process.guest_streams = await running.open_guest_streams(
            terminal=process.stdio.terminal, container_id=self.init.agent_id, exec_id=process.agent_id
        )
        return process.guest_streams

    @override
    async def _remove(self) -> None:
        """Remove the container in the guest, unless the machine has ended or is about to end."""
        try:
            agent = await self._sandbox.agent()
            timeout_s = CALL_TIMEOUT_S if self._files.has_disks else REMOVE_TIMEOUT_S
            await agent.containers.remove(self.init.agent_id, timeout_s=timeout_s)
        except (Unavailable, DeadlineExceeded) as error:
            log.warning("delete: container %s: not removed from the guest: %s", self.id, error)
            if isinstance(error, DeadlineExceeded) and not self._siblings.has_other_uses(self.id):
                await self._sandbox.switch_off(f"the guest did not remove {self.init}, its last: {error}")

    @override
    async def _take_back(self) -> None:
        await self._files.take_back()

    def _follow(self, process: Process, agent: Agent) -> None:
        if process.host_streams is None or process.guest_streams is None:
            raise Internal(f"stdio: {process}: followed before its streams were opened")
        process.copier = StreamCopier(
            process.guest_streams,
            stdio=process.stdio,
            host_streams=process.host_streams,
            name=process.agent_id if process.exec_id else self.id,
            heard=process.heard,
        )
        process.following = self._sandbox.work.spawn(
            self._follow_until_over(process, agent, process.copier), name=f"follow {process}"
        )

    async def _follow_until_over(self, process: Process, agent: Agent, copier: StreamCopier) -> None:
        """Copy a process's streams and wait for its exit, until both have ended."""
        try:
            async with asyncio.TaskGroup() as group:
                outputs = copier.outputs(group)
                stdin = group.create_task(copier.carry_input(process.started))
                if not agent.is_hako:
                    await asyncio.wait(outputs)
                status = await self._await_exit(process, agent)
                copier.process_ended()
                if process is self.init:
                    await self._await_execs()
                    # A client may stop reading once it has learnt of the exit of a task.
                    await copier.drained(outputs)
                async with self.lock:
                    self._report_exit(process, status)
                stdin.cancel()
            if process.host_streams is not None:
                await process.host_streams.finish()
        finally:
            process.close_streams()
            # No client may wait for this process forever, even after a failure above.
            self._report_exit(process, STATUS_UNKNOWN)

    async def _await_exit(self, process: Process, agent: Agent) -> int:
        try:
            return await agent.processes.wait(self.init.agent_id, exec_id=process.agent_id)
        except Unavailable as error:
            try:
                async with asyncio.timeout(MACHINE_END_TIMEOUT_S):
                    return await self._machine_ended(process)
            except TimeoutError:
                log.warning("wait: %s: %s; its status is %d", process, error, STATUS_KILLED)
                return STATUS_KILLED
        except ShimError as error:
            log.error("wait: %s: %s; its status is %d", process, error, STATUS_UNKNOWN)  # noqa: TRY400 - one line, no traceback
            return STATUS_UNKNOWN
        finally:
            process.ended.set()

    async def _await_execs(self) -> None:
        """Wait for the reports of the execs' exits: init's must be the last of its container."""
        self._ending = True
        running = [p.exited.wait() for p in self.execs.values() if p.state is State.RUNNING]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXECS_GONE_TIMEOUT_S):
                await asyncio.gather(*running)

"""One virtual machine and the containers in it, from the first boot to the last byte.

The machine boots while containerd is still connecting; whoever needs the agent waits for it here. The
death of the machine is an event: it ends every process of the sandbox at once, with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypervisor import HypervisorError
from shim.agent import guest_names
from shim.agent.oci_fields import refusing_malformed
from shim.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    ShimError,
    Unavailable,
)
from shim.host import kernel_limits, state_directory
from shim.machine import clock, template_builder
from shim.machine.machine import Machine
from shim.machine.pod import check_names, check_pod, is_pause, with_files, with_sysctls, write_files
from shim.machine.sizing import with_memory
from shim.sandbox.bundle import read_spec
from shim.sandbox.container import Container
from shim.sandbox.hooks import Hooks
from shim.sandbox.pause_container import PauseContainer
from shim.sandbox.watchers import follow_network, report_ooms
from shim.sandbox.work import Work
from shim.telemetry import metrics
from shim.telemetry.timeline_files import SandboxTimeline
from shim.volumes.followed_volumes import FollowedVolumes
from shim.volumes.memory_volumes import MemoryVolumes
from shim.volumes.shared_entries import SharedEntries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractAsyncContextManager

    from google.protobuf.message import Message

    from hypervisor import Hypervisor
    from proto.containerd.types_pb2 import Mount
    from proto.kata import agent_pb2
    from shim.agent.client import Agent
    from shim.agent.guest_streams import Transfer
    from shim.config import Config
    from shim.host.ledger import Ledger
    from shim.host.state_directory import StartRecord
    from shim.machine.pod import PodSpec
    from shim.machine.sizing import Limits
    from shim.sandbox.host_streams import Stdio
    from shim.sandbox.process import Process
    from shim.telemetry.events import Publisher

log = logging.getLogger(__name__)

PING_TIMEOUT_S = 2.0  # an agent that is well answers in milliseconds, under emulation too
CLOCK_TIMEOUT_S = 1.0  # right long before as a rule; a host too busy for that has the start go on
DESERTED_S = 5.0  # containerd ends a shim milliseconds after its last container, if it lives to do so
END_TIMEOUT_S = 10.0  # for a machine that is killed to be gone
LAST_OUTPUTS_TIMEOUT_S = 2.0  # for clients that read; the others have none of what is left
STATUS_KILLED = 128 + signal.SIGKILL


class Sandbox:
    """The machine of one shim.

    :param record: how the shim was started.
    :param config: the operator's configuration.
    :param publisher: where events go.
    :param ledger: where everything that must be undone is written down.
    :param group: owns every task of the sandbox.
    :param leave: ends the shim; called when nobody has a use for the sandbox any more.
    :param host_mounts: the mount namespace of whoever started the shim, open; None is this process's own.
    """

    def __init__(
        self,
        record: StartRecord,
        *,
        config: Config,
        publisher: Publisher,
        ledger: Ledger,
        group: asyncio.TaskGroup,
        leave: Callable[[], None],
        host_mounts: int | None = None,
    ) -> None:
        self.id = record.id
        self.namespace = record.namespace
        self.containers: dict[str, Container] = {}
        self._machine = Machine(
            record.id, directory=Path(record.state_directory), config=config, ledger=ledger
        )
        self.entries = SharedEntries(self._machine.share, daemons=self._machine.share_daemons)
        self._memory_volumes = MemoryVolumes(self.entries.writable)
        self._files = Path(record.state_directory) / "etc"
        self._pod: PodSpec | None = None
        self._record = record
        self._publisher = publisher
        self._ledger = ledger
        self._host_mounts = host_mounts
        self.timeline = SandboxTimeline(
            Path(record.state_directory),
            log_dir=Path(config.shim.log_dir),
            namespace=record.namespace,
            sandbox_id=record.id,
        )
        self._group = group
        self.work = Work(group)
        self.followed = FollowedVolumes(self.entries, work=self.work)
        self._leave = leave
        self._ready: asyncio.Future[Agent] = asyncio.get_running_loop().create_future()
        self._running: asyncio.Task[None] | None = None
        self._is_end_wanted = False
        #: Version 3 of the shim protocol: containerd creates further containers without a ``start``.
        self.is_joined_without_start = record.version >= 3
        #: Held by containerd's sandbox service: then only that ends the shim.
        self.held = False
        self._clock_is_right = asyncio.Event()
        self.ended = asyncio.Event()
        self.ended_at_s: float | None = None

    @property
    def pid(self) -> int:
        """The machine's process: the live host process that stands for every process inside it."""
        return self._machine.pid

    @property
    def vm(self) -> Hypervisor:
        """The machine; there is one as soon as :meth:`agent` has returned."""
        return self._machine.vm

    def publish(self, topic: str, event: Message) -> None:
        """Queue an event for containerd."""
        self._publisher.publish(topic, event)

    @property
    def is_started(self) -> bool:
        """Whether the machine boots, runs or has ended."""
        return self._running is not None or self._ready.done()

    @property
    def is_ready(self) -> bool:
        """Whether the machine is up."""
        return self._ready.done() and self._ready.exception() is None

    @property
    def is_needed(self) -> bool:
        """Whether containerd has a container in it, or holds it by its sandbox service."""
        return bool(self.containers) or self.held

    def has_other_uses(self, container_id: str) -> bool:
        """Whether the machine is of use beside a container: to another one, or to the sandbox service."""
        return self.held or any(other != container_id for other in self.containers)

    @property
    def exit_status(self) -> int:
        """How the machine ended: 0 if that was wanted, or as a process that was killed."""
        return 0 if self._is_end_wanted else STATUS_KILLED

    @property
    def created_at_s(self) -> float:
        """When the sandbox was asked for, in seconds since 1970."""
        return self._record.started_at

    @property
    def reason_of_end(self) -> str:
        """One line; empty as long as there is a machine, or one to come."""
        error = self._ready.exception() if self._ready.done() else None
        return str(error or "")

    def start(self, pod: PodSpec) -> None:
        """Begin to boot the machine; :meth:`agent` waits for it.

        :param pod: what it is for.
        """
        self._pod = pod
        self._running = self._group.create_task(self._live(pod), name="sandbox")

    def hold(self, pod: PodSpec) -> None:
        """Let containerd's sandbox service have the machine, and begin to boot it unless it does already.

        :param pod: what it is for.
        :raises Internal: if the files of the pod cannot be written.
        """
        try:
            write_files(pod, self._files)
        except OSError as error:
            raise Internal(f"create: {error.filename}: {error.strerror}; look at the host") from error
        self.held = True
        if not self.is_started:
            self.start(pod)

    async def complete(self, container: Container) -> dict[str, Any]:
        """Add to a container's specification what it shares with its pod, and what the host allows.

        :raises ShimError: if the specification is malformed, or the guest cannot hold a volume.
        """
        with refusing_malformed("config.json"):
            spec = kernel_limits.announce(container.spec, kernel_limits.raised())
            if self._pod is not None and self._pod.sysctls:
                spec = with_sysctls(spec, self._pod.sysctls)
            if self.held:
                spec = with_files(spec, self._files, sandbox_id=self.id)
        return await self._memory_volumes.serve(spec, user=container, agent=await self.agent())

    async def agent(self) -> Agent:
        """Wait for the machine to be up.

        :returns: the guest agent.
        :raises FailedPrecondition: if nobody has said yet what the machine is for.
        :raises ShimError: with the reason, if the machine did not come up or is gone.
        """
        if not self.is_started:
            raise FailedPrecondition(f"sandbox {self.id}: not created yet; call CreateSandbox first")
        return await asyncio.shield(self._ready)

    async def ping(self) -> None:
        """Have the agent answer now.

        :raises DeadlineExceeded: if it does not.
        :raises ShimError: if the machine is not up.
        """
        if self.is_started and not self._ready.done():
            raise Unavailable(f"ping: sandbox {self.id}: still boots; ask again")
        await (await self.agent()).check(timeout_s=PING_TIMEOUT_S)

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Measure all containers together.

        :raises ShimError: if the machine is not up.
        """
        await self.agent()
        containers = [one for one in self.containers.values() if not isinstance(one, PauseContainer)]
        measured = await asyncio.gather(*(_measure(one) for one in containers))
        return metrics.total(one for one in measured if one is not None)

    def hooks(self, container_id: str, *, bundle: Path, spec: dict[str, Any]) -> Hooks:
        """Read the hooks of a container.

        :raises InvalidArgument: if one is malformed, or cannot be run on the host.
        """
        return Hooks(
            container_id,
            bundle=bundle,
            spec=spec,
            mount_namespace=self._host_mounts,
            ledger=self._ledger,
        )

    async def transfer(self, process: Process) -> Transfer:
        """Choose how the streams of a process about to be made travel."""
        return await self._machine.transfer(
            process.stdio,
            await self.agent(),
            container_id=guest_names.agent_id(process.container_id),
            exec_id=process.agent_id,
        )

    def turn(self, *, lane: str) -> AbstractAsyncContextManager[None]:
        """Do the block when the host has a processor for it; see :func:`shim.machine.turns.turn`."""
        return self._machine.turn(lane=lane)

    async def make_ready(self) -> None:
        """Prepare a start: take what came to the network namespace, and await that the clock is right.

        :raises ShimError: if the machine cannot have what came to its network namespace.
        """
        await self.agent()
        await self._machine.follow_network()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOCK_TIMEOUT_S):
                await self._clock_is_right.wait()

    async def create(
        self, container_id: str, *, bundle: Path, rootfs: Iterable[Mount], stdio: Stdio
    ) -> Container:
        """Create a container in the machine.

        :raises AlreadyExists: if the id is taken.
        :raises ShimError: if a step fails; the id is free again.
        """
        if not self.is_started:
            raise FailedPrecondition(f"create: container {container_id}: its sandbox is not created yet")
        if container_id in self.containers:
            raise AlreadyExists(f"create: container {container_id}: already exists")
        spec = read_spec(bundle)
        check_names(spec)
        check_pod(spec, sandbox_id=self.id)
        kind = PauseContainer if is_pause(spec) else Container
        container = kind(container_id, bundle=bundle, spec=spec, stdio=stdio, sandbox=self)
        self.containers[container_id] = container
        self._ledger.created(container_id)
        try:
            if self.is_joined_without_start:
                self._point_to_state(bundle)
            await container.create(rootfs)
        except BaseException:
            self.forget(container_id)
            raise
        return container

    def forget(self, container_id: str) -> None:
        """Let go of a container: nothing of it is left, or its creation failed."""
        self.containers.pop(container_id, None)
        self._ledger.deleted(container_id)
        if self.containers:  # the machine of the last one goes as a whole
            self.work.spawn(self._shrink_if_alive(), name="shrink")
        else:
            asyncio.get_running_loop().call_later(DESERTED_S, self._leave_if_deserted)

    def _leave_if_deserted(self) -> None:
        """End the shim of which containerd, having died at the wrong moment, knows nothing any more."""
        if not self.is_needed:
            log.info("sandbox %s: without a container for %g s; its shim ends", self.id, DESERTED_S)
            self._leave()

    async def grow(self) -> None:
        """Make the machine large enough for its containers.

        :raises ResourceExhausted: if it cannot be done.
        """
        await self._machine.grow(await self.agent(), self._live_limits())

    async def shrink(self) -> None:
        """Take from the machine what its containers have no use for."""
        await self._machine.shrink(await self.agent(), self._live_limits())

    async def _grow_if_alive(self) -> None:
        try:
            await self.grow()
        except ShimError as error:  # the next container tries again, and fails if need be
            log.warning("grow: sandbox %s: %s", self.id, error)

    async def _shrink_if_alive(self) -> None:
        try:
            await self.shrink()
        except ShimError as error:
            log.debug("shrink: sandbox %s: %s", self.id, error)

    def _live_limits(self) -> list[Limits]:
        live = {
            one.id: one.limits
            for one in self.containers.values()
            if not one.init.exited.is_set() and not isinstance(one, PauseContainer)
        }
        return with_memory(live.values(), self._memory_volumes.needed_bytes(live))

    def _point_to_state(self, bundle: Path) -> None:
        """Leave in the bundle what ``start`` would have, had it been run for this container."""
        try:
            state_directory.point_to(self._record.state_directory, bundle=str(bundle))
        except OSError as error:
            raise Internal(f"create: {bundle}: {error.strerror}; look at the host") from error

    def container(self, container_id: str) -> Container:
        """Find a container that has been created.

        :raises NotFound: if there is none.
        """
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"container {container_id}: not found") from None

    async def switch_off(self, reason: str) -> None:
        """End the machine because it is of no use any more; its processes end with it.

        :param reason: one line for the log.
        """
        await self._machine.switch_off(reason)

    async def end(self) -> None:
        """Switch the machine off because containerd is done with it; return when it is off.

        :raises DeadlineExceeded: if it does not go.
        """
        self._is_end_wanted = self._is_end_wanted or not self.ended.is_set()
        await self._deliver_last_outputs()
        await self.switch_off("its end was asked for")
        if not self.is_started:
            self._over(Unavailable(f"sandbox {self.id}: {self._machine.doom}"))
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.ended.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"stop: sandbox {self.id}: its machine, pid {self.pid}, is not gone after {END_TIMEOUT_S:g} s"
            ) from error

    async def _deliver_last_outputs(self) -> None:
        """Let the clients have what processes wrote that have ended: it goes with the machine."""
        processes = [each for one in self.containers.values() for each in (one.init, *one.execs.values())]
        exits = [each.exited.wait() for each in processes if each.ended.is_set() and not each.exited.is_set()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_OUTPUTS_TIMEOUT_S):
                await asyncio.gather(*exits)

    async def keep_timeline(self, *, drawn: bool) -> None:
        """Write down where the time of the start went, in the guest too.

        :param drawn: also as a picture and as a trace.
        """
        self.timeline.is_drawn = self.timeline.is_drawn or drawn
        try:
            await self._machine.note_guest(await self.agent())
        except ShimError as error:
            log.debug("timeline: sandbox %s: the guest's part is missing: %s", self.id, error)
        self.timeline.write(kept=self.timeline.is_drawn)

    async def stop(self) -> None:
        """Switch the machine off and wait until nothing of it is left; stopping twice is harmless."""
        self.work.give_up()
        self.followed.stop()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        await self._machine.clear_away()
        self.timeline.write(kept=True)

    async def _live(self, pod: PodSpec) -> None:
        """Boot, then wait for the end of the machine; whoever asks for the agent learns the outcome."""
        reason: ShimError = Unavailable(f"sandbox {self.id}: its shim ends")
        try:
            reason = await self._live_until_over(pod)
        finally:
            self._over(reason)

    async def _live_until_over(self, pod: PodSpec) -> ShimError:
        """Return why the machine did not come up, or why it ended."""
        try:
            agent = await self._machine.boot(pod)
        except (ShimError, HypervisorError) as error:
            reason = error if isinstance(error, ShimError) else Internal(f"boot: sandbox {self.id}: {error}")
            self._report_end(str(reason))
            await self._machine.kill()
            return reason
        self._ready.set_result(agent)
        log.info("boot: sandbox %s: ready", self.id)
        watching = [
            self.work.spawn(report_ooms(agent, self.containers, self.publish), name="out of memory"),
            self.work.spawn(
                follow_network(self._machine, self.containers, sandbox_id=self.id), name="network"
            ),
            self.work.spawn(clock.keep(agent, pid=self.pid, right=self._clock_is_right), name="clock"),
        ]
        # A clone may be smaller than what is known already to be needed.
        self.work.spawn(self._grow_if_alive(), name="grow")
        if self._machine.lacks_template and agent.is_hako:  # no other says when it can be saved
            building = template_builder.start_unless_building(
                self._record.config_text, self._machine.templates, mount_namespace=self._host_mounts
            )
            self.work.spawn(building, name="template")
        try:
            ended = f"sandbox {self.id}: {await self._machine.reason_of_end(agent)}"
            self._report_end(ended)
            return Unavailable(ended)
        finally:
            for each in watching:
                each.cancel()
            await agent.aclose()

    def _report_end(self, reason: str) -> None:
        if self._is_end_wanted:
            log.info("%s", reason)
            return
        log.error("%s", reason)
        self._machine.keep_reason(reason, namespace=self.namespace)

    def _over(self, reason: ShimError) -> None:
        """Let everybody know that there is no machine any more."""
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()
        self._ready.set_exception(reason)
        self._ready.exception()  # marks it as seen: maybe nobody asks any more
        self.ended_at_s = time.time()
        self.ended.set()


async def _measure(container: Container) -> agent_pb2.StatsContainerResponse | None:
    """Measure one container of many; one that ends meanwhile counts for nothing."""
    try:
        return await container.stats()
    except ShimError as error:
        log.debug("stats: container %s: %s", container.id, error)
        return None

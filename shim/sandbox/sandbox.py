"""The life of one sandbox's machine, from its boot to its end.

The machine boots while containerd is still connecting; all that needs the agent waits for it here. The
death of the machine is an event, with a reason.
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
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    ShimError,
    Unavailable,
)
from shim.host import kernel_limits
from shim.machine import clock, template_builder
from shim.machine.machine import Machine
from shim.machine.pod import with_files, with_sysctls, write_files
from shim.sandbox.hooks import Hooks
from shim.sandbox.work import Work
from shim.telemetry.timeline_files import SandboxTimeline

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    from google.protobuf.message import Message

    from hypervisor import Hypervisor
    from shim.agent.client import Agent
    from shim.agent.guest_streams import GuestStreams
    from shim.config import Config
    from shim.host.ledger import Ledger
    from shim.host.state_directory import StartRecord
    from shim.machine.pod import PodSpec
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
        host_mounts: int | None = None,
    ) -> None:
        self.id = record.id
        self.namespace = record.namespace
        self.machine = Machine(
            record.id, directory=Path(record.state_directory), config=config, ledger=ledger
        )
        self.directory = Path(record.state_directory)
        self._files = self.directory / "etc"
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
        self._ready: asyncio.Future[Agent] = asyncio.get_running_loop().create_future()
        self._running: asyncio.Task[None] | None = None
        self._accompanying: list[tuple[str, Callable[[Agent], Coroutine[object, object, None]]]] = []
        self._is_end_wanted = False
        #: Held by containerd's sandbox service: then only that ends the shim.
        self.held = False
        self._clock_is_right = asyncio.Event()
        self.ended = asyncio.Event()
        self.ended_at_s: float | None = None

    @property
    def pid(self) -> int:
        """The machine's process: the live host process that stands for every process inside it."""
        return self.machine.pid

    @property
    def vm(self) -> Hypervisor:
        """The machine; there is one as soon as :meth:`agent` has returned."""
        return self.machine.vm

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

    def release(self) -> None:
        """Forget that containerd's sandbox service holds the machine."""
        self.held = False

    def while_running(self, work: Callable[[Agent], Coroutine[object, object, None]], *, name: str) -> None:
        """Have something done for as long as the machine runs.

        :param work: begun with the agent once that answers, and cancelled when the machine ends.
        :param name: for the log.
        """
        self._accompanying.append((name, work))

    def complete(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Add to a container's specification what it shares with its pod, and what the host allows.

        :raises ShimError: if the specification is malformed.
        """
        with refusing_malformed("config.json"):
            spec = kernel_limits.announce(spec, kernel_limits.raised())
            if self._pod is not None and self._pod.sysctls:
                spec = with_sysctls(spec, self._pod.sysctls)
            if self.held:
                spec = with_files(spec, self._files, sandbox_id=self.id)
        return spec

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

    async def open_guest_streams(self, process: Process) -> GuestStreams:
        """Choose how the streams of a process about to be made travel."""
        return await self.machine.open_guest_streams(
            process.stdio,
            await self.agent(),
            container_id=guest_names.agent_id(process.container_id),
            exec_id=process.agent_id,
        )

    def turn(self, *, lane: str) -> AbstractAsyncContextManager[None]:
        """Do the block when the host has a processor for it; see :func:`shim.machine.turns.turn`."""
        return self.machine.turn(lane=lane)

    async def make_ready(self) -> None:
        """Prepare a start: take what came to the network namespace, and await that the clock is right.

        :raises ShimError: if the machine cannot have what came to its network namespace.
        """
        await self.agent()
        await self.machine.follow_network()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOCK_TIMEOUT_S):
                await self._clock_is_right.wait()

    async def switch_off(self, reason: str) -> None:
        """End the machine because it is of no use any more; its processes end with it.

        :param reason: one line for the log.
        """
        await self.machine.switch_off(reason)

    def expect_end(self) -> None:
        """Note that the machine is to end, so that its end is no failure."""
        self._is_end_wanted = self._is_end_wanted or not self.ended.is_set()

    async def end(self) -> None:
        """Switch the machine off because containerd is done with it; return when it is off.

        :raises DeadlineExceeded: if it does not go.
        """
        self.expect_end()
        await self.switch_off("its end was asked for")
        if not self.is_started:
            self._over(Unavailable(f"sandbox {self.id}: {self.machine.doom}"))
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.ended.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"stop: sandbox {self.id}: its machine, pid {self.pid}, is not gone after {END_TIMEOUT_S:g} s"
            ) from error

    async def keep_timeline(self, *, drawn: bool) -> None:
        """Write down where the time of the start went, in the guest too.

        :param drawn: also as a picture and as a trace.
        """
        self.timeline.is_drawn = self.timeline.is_drawn or drawn
        try:
            await self.machine.note_guest(await self.agent())
        except ShimError as error:
            log.debug("timeline: sandbox %s: the guest's part is missing: %s", self.id, error)
        self.timeline.write(kept=self.timeline.is_drawn)

    async def stop(self) -> None:
        """Switch the machine off and wait until nothing of it is left; stopping twice is harmless."""
        self.work.give_up()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        await self.machine.clear_away()
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
            agent = await self.machine.boot(pod)
        except (ShimError, HypervisorError) as error:
            reason = error if isinstance(error, ShimError) else Internal(f"boot: sandbox {self.id}: {error}")
            self._report_end(str(reason))
            await self.machine.kill()
            return reason
        self._ready.set_result(agent)
        log.info("boot: sandbox %s: ready", self.id)
        watching = [
            self.work.spawn(clock.keep(agent, pid=self.pid, right=self._clock_is_right), name="clock"),
            *(self.work.spawn(work(agent), name=name) for name, work in self._accompanying),
        ]
        if self.machine.lacks_template and agent.is_hako:  # no other says when it can be saved
            building = template_builder.start_unless_building(
                self._record.config_text, self.machine.templates, mount_namespace=self._host_mounts
            )
            self.work.spawn(building, name="template")
        try:
            ended = f"sandbox {self.id}: {await self.machine.reason_of_end(agent)}"
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
        self.machine.keep_reason(reason, namespace=self.namespace)

    def _over(self, reason: ShimError) -> None:
        """Let everybody know that there is no machine any more."""
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()
        self._ready.set_exception(reason)
        self._ready.exception()  # marks it as seen: maybe nobody asks any more
        self.ended_at_s = time.time()
        self.ended.set()

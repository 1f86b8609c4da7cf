"""The life of one sandbox's machine, from its boot to its end.

The machine boots while containerd is still connecting; callers that need it wait for it here. The death of
the machine is an event, with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypervisor import HypervisorError
from shim.agent.oci_fields import refusing_malformed
from shim.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    ShimError,
    Unavailable,
)
from shim.host import kernel_limits
from shim.host.host_process import STATUS_KILLED
from shim.machine import clock, pod_annotations
from shim.machine.pod import from_oci, with_files, with_sysctls, write_files
from shim.machine.rest import Rest
from shim.sandbox.counting import Counting
from shim.sandbox.life import OVER, Happening, Life, following
from shim.sandbox.tracing import Tracing
from shim.telemetry import event_feed
from shim.telemetry.journal import Journal
from shim.telemetry.timeline_files import SandboxTimeline

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from shim.agent.client import Agent
    from shim.machine.machine import Machine
    from shim.machine.pod import PodSpec
    from shim.machine.running import RunningMachine
    from shim.sandbox.context import Context

    Accompaniment = Callable[[RunningMachine], Coroutine[object, object, None]]

log = logging.getLogger(__name__)

PING_TIMEOUT_S = 2.0  # an agent that is well answers in milliseconds, under emulation too
CLOCK_TIMEOUT_S = 5.0  # usually right long before; on a very busy host, the start continues without it
END_TIMEOUT_S = 10.0  # for a killed machine to end


class Sandbox:
    """The machine of one shim.

    :param context: the shim's particulars, made by the daemon.
    :param machine: the machine, which boots when the sandbox is started.
    """

    def __init__(self, context: Context, machine: Machine) -> None:
        record = context.record
        self.id = record.id
        self.namespace = record.namespace
        self.directory = context.directory
        #: When the sandbox was requested, in seconds since 1970.
        self.created_at_s = record.started_at
        self.publish = context.publisher.publish
        self.work = context.work
        self.timeline = SandboxTimeline(
            context.directory,
            log_dir=Path(context.config.shim.log_dir),
            namespace=record.namespace,
            sandbox_id=record.id,
        )
        self.tracing = Tracing(
            context.traces,
            timeline=self.timeline,
            work=context.work,
            attributes={"hako.sandbox.id": record.id, "hako.namespace": record.namespace},
            sandbox_has_failed=lambda: self.state in OVER and not self._came_up,
        )
        self.counting = Counting(Journal(Path(context.config.shim.log_dir)), created_at_s=record.started_at)
        self.state = Life.AWAITED
        #: Whether containerd's sandbox service uses it; then only that service ends the shim.
        self.is_held = False
        self.ended = asyncio.Event()
        self.ended_at_s: float | None = None
        self._context = context
        self._machine = machine
        #: The pod of the machine.
        self.pod = from_oci({})
        self._files = context.directory / "etc"
        #: Ends the task of the machine's life, once there is one.
        self._begun = contextlib.AsyncExitStack()
        self._accompanying: list[tuple[str, Accompaniment]] = []
        #: The running machine, or the reason why there is none.
        self._now: RunningMachine | ShimError = FailedPrecondition(
            f"sandbox {self.id}: not created yet; call CreateSandbox first"
        )
        self._settled = asyncio.Event()
        self._came_up = False
        self._clock_is_right = asyncio.Event()

    @property
    def pid(self) -> int:
        """The live host process that stands for every process in the machine; 0 if there is none yet."""
        return self._machine.pid

    @property
    def is_ready(self) -> bool:
        """Whether the machine runs."""
        return not isinstance(self._now, ShimError)

    @property
    def exit_status(self) -> int:
        """The status of the machine's end: 0 if containerd wanted it, otherwise that of a killed process."""
        return STATUS_KILLED if self.state is Life.DIED else 0

    @property
    def reason_of_end(self) -> str:
        """The reason for the end in one line; empty while there is, or will be, a machine."""
        return str(self._now) if self.state in OVER else ""

    def start(self, pod: PodSpec) -> None:
        """Start to boot the machine; :meth:`running` waits for it.

        :param pod: its pod.
        :raises FailedPrecondition: if it was started before, or should end.
        """
        self._apply(Happening.START)
        self.pod = pod
        self._begun.push_async_callback(_cancelled, self.work.run(self._live(pod), name="sandbox"))

    def hold(self, pod: PodSpec) -> None:
        """Give the machine to containerd's sandbox service, and start to boot it unless it already boots.

        :param pod: its pod.
        :raises AlreadyExists: if the service already has it.
        :raises FailedPrecondition: if the machine has ended.
        :raises Internal: if the files of the pod cannot be written.
        """
        if self.is_held:
            raise AlreadyExists(f"create: sandbox {self.id}: already exists")
        if self.state in OVER:
            raise FailedPrecondition(f"create: {self.reason_of_end}")
        try:
            write_files(pod, self._files)
        except OSError as error:
            raise Internal(f"create: {error.filename}: {error.strerror}; look at the host") from error
        self.is_held = True
        if self.state is Life.AWAITED:
            self.start(pod)

    def release(self) -> None:
        """Take the machine back from containerd's sandbox service."""
        self.is_held = False

    def while_running(self, work: Accompaniment, *, name: str) -> None:
        """Run a task while the machine runs.

        :param work: started once the machine runs, and cancelled when it ends.
        :param name: for the log.
        """
        self._accompanying.append((name, work))

    def complete(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Add the pod's shared files and parameters, and the host's limits, to a container's specification.

        :raises ShimError: if the specification is malformed.
        """
        with refusing_malformed("config.json"):
            spec = kernel_limits.announce(spec, kernel_limits.raised())
            if self.pod.sysctls:
                spec = with_sysctls(spec, self.pod.sysctls)
            if self.is_held:
                spec = with_files(spec, self._files, sandbox_id=self.id)
        return spec

    def check_annotations(self, spec: dict[str, Any], *, container_id: str) -> None:
        """Refuse a container with annotations that are not allowed; warn if this machine does not have them.

        :raises InvalidArgument: with the name of the annotation.
        """
        config = self._context.config
        wanted = pod_annotations.applied(config, spec, phase="create")
        if wanted not in (config, pod_annotations.applied(config, self.pod.oci, phase="create")):
            log.warning(
                "create: container %s: its annotations ask for another machine than its pod's; ignored",
                container_id,
            )

    async def running(self, *, awake: bool = True) -> RunningMachine:
        """Wait for the machine to be up.

        :param awake: whether it is woken if it is parked.
        :raises FailedPrecondition: if the machine's pod is not known yet.
        :raises ShimError: with the reason, if the machine did not come up, does not wake or is gone.
        """
        if self.state is not Life.AWAITED:
            await self._settled.wait()
        if isinstance(self._now, ShimError):
            raise self._now.with_traceback(None)
        if awake and self._now.parking.rest is not Rest.AWAKE:
            await self._now.agent.gate.woken()
        return self._now

    async def agent(self) -> Agent:
        """Wait until the machine runs, and return its agent; see :meth:`running`."""
        return (await self.running()).agent

    async def ping(self) -> None:
        """Have the agent answer now, unless the machine is parked.

        :raises DeadlineExceeded: if it does not.
        :raises ShimError: if the machine does not run.
        """
        if self.state is not Life.AWAITED and not self._settled.is_set():
            raise Unavailable(f"ping: sandbox {self.id}: still boots; ask again")
        machine = await self.running(awake=False)
        if machine.parking.is_awake:
            await machine.agent.check(timeout_s=PING_TIMEOUT_S)

    async def make_ready(self) -> None:
        """Prepare a start: add new network interfaces, and wait until the clock is right.

        :raises ShimError: if the machine cannot have a new interface.
        """
        await (await self.running()).follow_network()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOCK_TIMEOUT_S):
                await self._clock_is_right.wait()

    async def switch_off(self, reason: str) -> None:
        """End the machine because it is no longer needed; its processes end with it.

        :param reason: one line for the log.
        """
        await self._machine.switch_off(reason)

    def expect_end(self) -> None:
        """Record that containerd wants the machine to end; one that never started has then ended."""
        was_awaited = self.state is Life.AWAITED
        self._apply(Happening.END_WANTED)
        if was_awaited:
            self._conclude(Unavailable(f"sandbox {self.id}: switched off: its end was asked for"))

    async def end(self) -> None:
        """Switch the machine off because containerd no longer needs it; return when it is off.

        :raises DeadlineExceeded: if it does not end.
        """
        self.expect_end()
        await self.switch_off("its end was asked for")
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.ended.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"stop: sandbox {self.id}: its machine, pid {self.pid}, is not gone after {END_TIMEOUT_S:g} s"
            ) from error

    async def keep_timeline(self, container_id: str, *, drawn: bool) -> None:
        """Write the phases of a container's start, including those in the guest, and send them as a trace.

        :param container_id: the container.
        :param drawn: also keep it as a picture and as a trace.
        """
        self.timeline.is_drawn = self.timeline.is_drawn or drawn
        try:
            await (await self.running()).note_guest()
        except ShimError as error:
            log.debug("timeline: sandbox %s: the guest's part is missing: %s", self.id, error)
        self.timeline.write(kept=self.timeline.is_drawn)
        await self.tracing.send(container_id)

    async def stop(self) -> None:
        """Switch the machine off and wait until nothing of it is left; stopping twice is harmless."""
        self.work.give_up()
        await self._begun.aclose()
        await self._machine.clear_away()
        self.timeline.write(kept=True)
        self.counting.ended()

    async def _live(self, pod: PodSpec) -> None:
        """Boot, then wait for the end of the machine."""
        reason: ShimError = Unavailable(f"sandbox {self.id}: its shim ends")
        try:
            reason = await self._live_until_over(pod)
        finally:
            self._apply(Happening.GONE)
            self._conclude(reason)

    async def _live_until_over(self, pod: PodSpec) -> ShimError:
        """Return why the machine did not start, or why it ended."""
        try:
            running = await self._machine.boot(pod)
        except (ShimError, HypervisorError) as error:
            reason = error if isinstance(error, ShimError) else Internal(f"boot: sandbox {self.id}: {error}")
            if self.state is not Life.ENDING:
                self.counting.failed("boot", cause=type(error).__name__)
            self._report_end(str(reason))
            await self._machine.kill()
            return reason
        self._apply(Happening.READY)
        self._now = running
        self._came_up = True
        self._settled.set()
        self._context.publisher.feed.note(event_feed.READY)
        self.counting.started(self._machine.cloning.outcome)
        log.info("boot: sandbox %s: ready", self.id)
        keeping_time = clock.keep(running.agent, pid=self.pid, right=self._clock_is_right)
        accompanying = [
            self.work.spawn(keeping_time, name="clock"),
            *(self.work.spawn(work(running), name=name) for name, work in self._accompanying),
        ]
        if running.agent.is_hako:  # other agents do not report when they can be saved
            building = self._machine.cloning.build_what_lacks(
                self._context.record.config_text, mount_namespace=self._context.host_mounts
            )
            self.work.spawn(building, name="template")
        try:
            ended = f"sandbox {self.id}: {await self._machine.reason_of_end(running)}"
            if self.state is not Life.ENDING:
                self.counting.failed("run", cause="Died")
            self._report_end(ended)
            return Unavailable(ended)
        finally:
            for each in accompanying:
                each.cancel()
            await running.agent.aclose()

    def _report_end(self, reason: str) -> None:
        if self.state is Life.ENDING:
            log.info("%s", reason)
            return
        log.error("%s", reason)
        self._machine.keep_reason(reason, namespace=self.namespace)

    def _apply(self, happening: Happening) -> None:
        self.state = following(self.state, happening)

    def _conclude(self, reason: ShimError) -> None:
        """Tell all waiting callers that there is no longer a machine."""
        self._now = reason
        self.ended_at_s = time.time()
        self._context.publisher.feed.note(event_feed.END, text=str(reason))
        self._settled.set()
        self.ended.set()


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.wait({task})

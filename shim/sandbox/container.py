"""Any container as containerd sees it: its init, its execs, and the order of their events.

There are two kinds: :class:`~shim.sandbox.guest_container.GuestContainer` runs in the guest, and
:class:`~shim.sandbox.pause_container.PauseContainer` only stands for its pod.

A lock for each container orders steps that must not interleave: start and exit (so that the start event is
queued first), delete and exec. Kill, State and Wait take no lock and never wait for one.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from shim.errors import NotFound
from shim.host.host_process import STATUS_KILLED
from shim.sandbox import task_events
from shim.sandbox.life import Life
from shim.sandbox.process import Input, Process, State
from shim.sandbox.stream_copying import DRAIN_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from proto.containerd.types_pb2 import Mount
    from proto.kata import agent_pb2
    from shim.sandbox.hooks import Hooks
    from shim.sandbox.host_streams import Stdio
    from shim.sandbox.parking import PodParking
    from shim.sandbox.sandbox import Sandbox

log = logging.getLogger(__name__)


class Siblings(Protocol):
    """All containers of a sandbox, as seen by one of them."""

    def has_other_uses(self, container_id: str) -> bool:
        """Tell whether the machine serves anything beside a container."""

    def forget(self, container_id: str) -> None:
        """Forget a container that has been removed completely."""

    async def grow(self) -> None:
        """Make the machine large enough for all containers.

        :raises ResourceExhausted: if that is impossible.
        """

    async def shrink(self) -> None:
        """Shrink the machine to the size that its containers need."""

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Measure all containers together.

        :raises ShimError: if the machine does not run.
        """

    @property
    def parking(self) -> PodParking:
        """The parking of the pod."""


class Container(abc.ABC):
    """A container of a sandbox.

    :param container_id: containerd's id.
    :param bundle: the bundle directory.
    :param spec: the decoded ``config.json``.
    :param stdio: init's stream paths.
    :param sandbox: the machine that it belongs to.
    :param siblings: all containers of the sandbox.
    :param hooks: programs of the host that its specification names.
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
    ) -> None:
        self.id = container_id
        self.bundle = bundle
        self.spec = spec
        self.init = Process(container_id, exec_id="", stdio=stdio, spec={})
        self.execs: dict[str, Process] = {}
        self.lock = asyncio.Lock()
        self._sandbox = sandbox
        self._siblings = siblings
        self._hooks = hooks
        self._settled = asyncio.Event()

    def process(self, exec_id: str) -> Process:
        """Find init (empty id) or an exec.

        :raises NotFound: if there is no such exec.
        """
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"exec {exec_id} of {self.id}: not found") from None

    async def create(self, rootfs: Iterable[Mount]) -> None:
        """Create the container up to the point where its init waits to be started.

        :param rootfs: containerd's mounts for the root file system.
        :raises ShimError: if any step fails; nothing is left behind.
        """
        try:
            await self._bring_up(rootfs)
        except BaseException:
            self.init.apply(Input.DELETE)
            await self._hooks.deleted()
            raise
        finally:
            self._settled.set()
        event = task_events.created(self.init, bundle=self.bundle, rootfs=rootfs, pid=self._sandbox.pid)
        self._sandbox.publish(*event)

    async def start(self) -> None:
        """Let init run.

        :raises FailedPrecondition: if it is not in the created state.
        """
        async with self.lock:
            self.init.require(Input.START)
            await self._run()
            self.init.apply(Input.START)
            self._sandbox.publish(*task_events.started(self.id, pid=self._sandbox.pid))
        await self._hooks.started(pid=self._sandbox.pid)

    async def pause(self) -> None:
        """Freeze the container.

        :raises FailedPrecondition: if it is not running.
        """
        async with self.lock:
            self.init.require(Input.PAUSE)
            await self._freeze()
            self.init.apply(Input.PAUSE)
            self._sandbox.publish(*task_events.paused(self.id))
        self._siblings.parking.consider()

    async def resume(self) -> None:
        """Thaw the container.

        :raises FailedPrecondition: if it is not paused.
        """
        async with self.lock:
            self.init.require(Input.RESUME)
            await self._thaw()
            self.init.apply(Input.RESUME)
            self._sandbox.publish(*task_events.resumed(self.id))
        self._siblings.parking.consider()

    async def delete(self) -> None:
        """Remove the container from the guest, and undo the sharing of its files.

        :raises NotFound: if its creation failed, or it is already deleted.
        :raises FailedPrecondition: if init is running.
        """
        await self._settled.wait()
        self._require_deletable()
        removed = self.init.state is State.CREATED
        if removed:  # init still waits to be started; the removal ends it
            await self._remove()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_TIMEOUT_S):
                    await self.init.exited.wait()
        async with self.lock:
            self._require_deletable()
            for process in (self.init, *self.execs.values()):
                await process.drained()
            if not removed:
                await self._remove()
            await self._take_back()
            await self._hooks.deleted()
            self.init.apply(Input.DELETE)
            self._siblings.forget(self.id)
            self._sandbox.publish(*task_events.deleted(self.init, pid=self._sandbox.pid))

    async def delete_exec(self, exec_id: str) -> None:
        """Forget an exec.

        :raises NotFound: if there is no such exec.
        :raises FailedPrecondition: if it is running.
        """
        process = self.process(exec_id)
        process.require(Input.DELETE)
        await process.drained()
        process.apply(Input.DELETE)
        del self.execs[exec_id]

    @abc.abstractmethod
    async def update(self, resources: dict[str, Any]) -> None:
        """Change the container's limits.

        :param resources: as ``linux.resources`` of an OCI specification; limits that it does not mention
            stay.
        :raises ShimError: if they are malformed or refused, or the container has ended.
        """

    @abc.abstractmethod
    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Measure the container.

        :raises NotFound: if it has ended.
        """

    @abc.abstractmethod
    async def exec_ids_of_processes(self) -> list[str]:
        """List every process except init by the id of its exec; a child of another process has an empty id.

        :raises NotFound: if the container has ended.
        """

    @abc.abstractmethod
    def add_exec(self, exec_id: str, *, spec: dict[str, Any], stdio: Stdio) -> None:
        """Register an exec; it runs on :meth:`start_exec`.

        :raises ShimError: if the id is taken, or the container cannot run it.
        """

    @abc.abstractmethod
    async def start_exec(self, exec_id: str) -> None:
        """Run a registered exec.

        :raises NotFound: if there is no such exec.
        :raises ShimError: if it cannot run.
        """

    @abc.abstractmethod
    async def resize(self, process: Process, width: int, height: int) -> None:
        """Set the size of a process's terminal; a process without one ignores it."""

    @abc.abstractmethod
    async def kill(self, process: Process, *, number: int, everyone: bool) -> None:
        """Send a signal to one process, or to all of the container.

        :param number: the signal's number.
        :raises NotFound: if the process has ended.
        """

    @abc.abstractmethod
    async def _bring_up(self, rootfs: Iterable[Mount]) -> None:
        """Make init, which then waits to be started; a failure leaves nothing behind."""

    @abc.abstractmethod
    async def _run(self) -> None:
        """Let init run."""

    @abc.abstractmethod
    async def _freeze(self) -> None:
        """Stop every process of the container."""

    @abc.abstractmethod
    async def _thaw(self) -> None:
        """Let the processes of the container continue."""

    @abc.abstractmethod
    async def _remove(self) -> None:
        """Remove the container from its machine; this ends an init that was never started."""

    @abc.abstractmethod
    async def _take_back(self) -> None:
        """Undo the host's work for the container."""

    def _require_alive_for(self, what: str) -> None:
        """Refuse a request that needs a container that has not ended.

        :raises NotFound: if it has ended.
        """
        if self.init.exited.is_set():
            raise NotFound(f"{what}: container {self.id}: not running")

    def _require_deletable(self) -> None:
        if self.init.state is State.DELETED:
            raise NotFound(f"container {self.id}: not found")
        self.init.require(Input.DELETE)

    async def _machine_ended(self, process: Process) -> int:
        """Wait until the machine has ended, and log what that means for a process.

        :returns: the exit status of the process.
        """
        await self._sandbox.ended.wait()
        level = logging.WARNING if self._sandbox.state is Life.DIED else logging.INFO
        reason = self._sandbox.reason_of_end
        log.log(level, "wait: %s: %s; its status is %d", process, reason, STATUS_KILLED)
        return STATUS_KILLED

    def _report_exit(self, process: Process, status: int) -> None:
        if process.exit(status):
            self._sandbox.publish(*task_events.exited(process, pid=self._sandbox.pid))
            self._siblings.parking.consider()

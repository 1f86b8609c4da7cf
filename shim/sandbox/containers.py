"""The containers of one sandbox: their shared files, their total needs, and the end of the shim."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from hypervisor import Allowance
from shim.agent import guest_names
from shim.errors import AlreadyExists, FailedPrecondition, Internal, NotFound, ShimError
from shim.host import state_directory
from shim.machine.limits import with_memory
from shim.machine.pod import check_names, check_pod, is_pause, oom_score_adj_of
from shim.sandbox import task_events
from shim.sandbox.bundle import read_spec, wait_for_spec
from shim.sandbox.guest_container import GuestContainer
from shim.sandbox.hooks import Hooks
from shim.sandbox.life import Life
from shim.sandbox.parking import PodParking
from shim.sandbox.pause_container import PauseContainer
from shim.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from proto.containerd.types_pb2 import Mount
    from proto.kata import agent_pb2
    from shim.machine.limits import Limits
    from shim.machine.running import RunningMachine
    from shim.sandbox.container import Container
    from shim.sandbox.context import Context
    from shim.sandbox.host_streams import Stdio
    from shim.sandbox.sandbox import Sandbox
    from shim.sandbox.shared_volumes import SharedVolumes

log = logging.getLogger(__name__)

DESERTED_S = 5.0  # containerd ends a shim milliseconds after its last container, unless containerd has died
LAST_OUTPUTS_TIMEOUT_S = 2.0  # for clients that read; others lose the rest

_KILLS_AT_ONCE, _KILLS_PER_S = 100, 10  # reported to containerd at once; more of them are reported later


class Containers:
    """The containers of one sandbox.

    :param context: the shim's particulars, made by the daemon.
    :param sandbox: the life of their machine.
    :param volumes: the host's files that they share.
    """

    def __init__(self, context: Context, sandbox: Sandbox, volumes: SharedVolumes) -> None:
        self._context = context
        self._sandbox = sandbox
        self._ledger = context.ledger
        self._leave = context.leave
        #: Every container by its id, also one that is being created.
        self.all: dict[str, Container] = {}
        self._volumes = volumes
        #: Version 3 of the shim protocol: containerd creates more containers without calling ``start``.
        self._is_joined_without_start = context.record.version >= 3
        self._was_told_to_end = False
        self.parking = PodParking(sandbox, self._guests, note=context.publisher.feed.note)
        sandbox.while_running(self._report_ooms, name="out of memory")
        sandbox.while_running(self._follow_network, name="network")
        sandbox.while_running(self._grow_at_first, name="grow")
        sandbox.while_running(lambda running: running.bound_files(), name="share")

    @property
    def is_needed(self) -> bool:
        """Whether containerd has a container in the sandbox, or uses it through its sandbox service."""
        return bool(self.all) or self._sandbox.is_held

    def has_other_uses(self, container_id: str) -> bool:
        """Tell whether the machine serves another container, or containerd's sandbox service."""
        return self._sandbox.is_held or any(other != container_id for other in self.all)

    async def create(
        self, container_id: str, *, bundle: Path, rootfs: Iterable[Mount], stdio: Stdio
    ) -> Container:
        """Create a container in the machine.

        :raises AlreadyExists: if the id is taken.
        :raises ShimError: if a step fails; the id is free again.
        """
        if self._sandbox.state is Life.AWAITED:
            raise FailedPrecondition(f"create: container {container_id}: its sandbox is not created yet")
        if container_id in self.all:
            raise AlreadyExists(f"create: container {container_id}: already exists")
        await wait_for_spec(
            bundle, others=[mount.source for mount in rootfs], phase=f"create: container {container_id}"
        )
        if container_id in self.all:  # meanwhile
            raise AlreadyExists(f"create: container {container_id}: already exists")
        container = self._new(container_id, bundle=bundle, stdio=stdio)
        self.all[container_id] = container
        self._ledger.created(container_id)
        try:
            if self._is_joined_without_start:
                _point_to_state(self._context, bundle)
            await container.create(rootfs)
        except BaseException:
            self.forget(container_id)
            raise
        with contextlib.suppress(ShimError):  # the machine has ended, which the container's end reports
            await self._share_oom_scores()
        return container

    async def _share_oom_scores(self) -> None:
        """Let the kernel kill the machine for memory as readily as its least protected container."""
        scores = [oom_score_adj_of(one.spec) for one in self._guests()]
        told = [score for score in scores if score is not None]
        if told:
            (await self._sandbox.running(awake=False)).set_oom_score_adj(max(told))

    def _new(self, container_id: str, *, bundle: Path, stdio: Stdio) -> Container:
        spec = read_spec(bundle)
        check_names(spec)
        check_pod(spec, sandbox_id=self._sandbox.id)
        self._sandbox.check_annotations(spec, container_id=container_id)
        hooks = Hooks(
            container_id,
            bundle=bundle,
            spec=spec,
            mount_namespace=self._context.host_mounts,
            ledger=self._ledger,
        )
        if is_pause(spec):
            return PauseContainer(
                container_id,
                bundle=bundle,
                spec=spec,
                stdio=stdio,
                sandbox=self._sandbox,
                siblings=self,
                hooks=hooks,
            )
        return GuestContainer(
            container_id,
            bundle=bundle,
            spec=spec,
            stdio=stdio,
            sandbox=self._sandbox,
            siblings=self,
            hooks=hooks,
            volumes=self._volumes,
        )

    def get(self, container_id: str) -> Container:
        """Find a container that has been created.

        :raises NotFound: if there is none.
        """
        try:
            return self.all[container_id]
        except KeyError:
            raise NotFound(f"container {container_id}: not found") from None

    def has(self, container_id: str) -> bool:
        """Tell whether a container has been created, or is being created."""
        return container_id in self.all

    async def delete(self, container_id: str, *, exec_id: str = "") -> None:
        """Remove a container that has ended or one of its execs, even if the caller goes away.

        If containers join without a ``start``, containerd asks the shim to shut down only after the pod's own
        task. If that task was removed first, the shim ends with the last container.

        :param exec_id: the exec; empty for the container.
        :raises NotFound: if there is none.
        :raises FailedPrecondition: if it is running.
        """
        container = self.get(container_id)
        if exec_id:
            await self._sandbox.work.finish(container.delete_exec(exec_id))
            return
        await self._sandbox.work.finish(container.delete())
        if self._was_told_to_end and self._is_joined_without_start:
            self._leave_unless_needed()

    def forget(self, container_id: str) -> None:
        """Forget a container: nothing of it is left, or its creation failed."""
        self.all.pop(container_id, None)
        self._ledger.deleted(container_id)
        self.parking.consider()
        if self.all:  # after the last one, the whole machine ends
            self._sandbox.work.spawn(self._shrink_if_alive(), name="shrink")
        else:
            asyncio.get_running_loop().call_later(DESERTED_S, self._leave_if_deserted)

    def shut_down(self) -> None:
        """End the shim, unless containers are left or containerd's sandbox service uses it."""
        self._was_told_to_end = True
        self._leave_unless_needed()

    async def end(self) -> None:
        """Switch the machine off because containerd no longer needs it; return when it is off.

        :raises DeadlineExceeded: if it does not end.
        """
        self._sandbox.expect_end()
        await self._deliver_last_outputs()
        await self._sandbox.end()

    async def dismiss(self) -> None:
        """Switch the machine off and end the shim, even if containers are left.

        :raises DeadlineExceeded: if the machine does not end; the shim stays then.
        """
        await self.end()
        self._sandbox.release()
        self._leave()

    async def stop(self) -> None:
        """End everything and wait until nothing of the machine is left; stopping twice is harmless."""
        self._volumes.followed.stop()
        await self._sandbox.stop()

    async def grow(self) -> None:
        """Make the machine large enough for its containers.

        :raises ResourceExhausted: if that is impossible.
        """
        await (await self._sandbox.running()).grow(self._live_limits())

    async def shrink(self) -> None:
        """Shrink the machine to the size that its containers need."""
        await (await self._sandbox.running()).shrink(self._live_limits())

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Measure all containers together.

        :raises ShimError: if the machine does not run.
        """
        await self._sandbox.running(awake=False)
        measured = await asyncio.gather(*(_measure(one) for one in self._guests()))
        return metrics.total(one for one in measured if one is not None)

    def _leave_unless_needed(self) -> None:
        if not self.is_needed:
            self._leave()

    def _leave_if_deserted(self) -> None:
        """End a shim that containerd has forgotten because it died at the wrong moment."""
        if not self.is_needed:
            log.info("sandbox %s: without a container for %g s; its shim ends", self._sandbox.id, DESERTED_S)
            self._leave()

    def _guests(self) -> list[GuestContainer]:
        return [one for one in self.all.values() if isinstance(one, GuestContainer)]

    def _live_limits(self) -> list[Limits]:
        live = {one.id: one.limits for one in self._guests() if not one.init.exited.is_set()}
        return with_memory(live.values(), self._volumes.memory.needed_bytes(live))

    async def _grow_at_first(self, running: RunningMachine) -> None:
        """Give a clone, which may be too small, the size for its known containers."""
        try:
            await running.grow(self._live_limits())
        except ShimError as error:  # the next container tries again, and reports the failure
            log.warning("grow: sandbox %s: %s", self._sandbox.id, error)

    async def _shrink_if_alive(self) -> None:
        try:
            await self.shrink()
        except ShimError as error:
            log.debug("shrink: sandbox %s: %s", self._sandbox.id, error)

    async def _report_ooms(self, running: RunningMachine) -> None:
        """Report to containerd each container in which the guest's kernel killed a process for memory.

        An agent may answer any number of times, so the requests to it are limited.
        """
        allowance = Allowance(burst=_KILLS_AT_ONCE, per_s=_KILLS_PER_S)
        try:
            while True:
                container_id = guest_names.container_id(await running.agent.next_oom())
                if container_id in self.all:
                    self._sandbox.publish(*task_events.out_of_memory(container_id))
                await allowance.wait()
        except ShimError as error:
            log.debug("out of memory: reports end: %s", error)

    async def _follow_network(self, running: RunningMachine) -> None:
        """Follow changes of the network namespace, as ``docker network connect`` makes them.

        Once all containers have ended, removals from the namespace are a consequence of that.
        """
        while True:
            await running.network_changed()
            await running.agent.gate.free()
            if all(one.init.exited.is_set() for one in self.all.values()):
                continue
            try:
                await running.follow_network()
            except ShimError as error:
                log.warning("network: sandbox %s: %s", self._sandbox.id, error)

    async def _deliver_last_outputs(self) -> None:
        """Pass on to clients what ended processes wrote, because it is lost with the machine."""
        processes = [each for one in self.all.values() for each in (one.init, *one.execs.values())]
        exits = [each.exited.wait() for each in processes if each.ended.is_set() and not each.exited.is_set()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_OUTPUTS_TIMEOUT_S):
                await asyncio.gather(*exits)


def _point_to_state(context: Context, bundle: Path) -> None:
    """Write the files into a bundle that ``start`` would have written for its container."""
    try:
        state_directory.point_to(context.record.state_directory, bundle=str(bundle))
    except OSError as error:
        raise Internal(f"create: {bundle}: {error.strerror}; look at the host") from error


async def _measure(container: GuestContainer) -> agent_pb2.StatsContainerResponse | None:
    """Measure one container of many; one that ends meanwhile counts as zero."""
    try:
        return await container.stats()
    except ShimError as error:
        log.debug("stats: container %s: %s", container.id, error)
        return None

"""When a pod is parked: once all of its containers have been paused for a while, or at an operator's request.

A pod that an operator parks is paused first, and only containers that were paused for that are resumed with
it. Requests that need the guest wake the machine. Queries for a state or a measurement are answered from the
last known values.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Protocol

from shim.errors import FailedPrecondition, ShimError
from shim.machine.rest import Rest
from shim.sandbox.life import Life
from shim.sandbox.process import State
from shim.telemetry import event_feed, latency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shim.machine.running import RunningMachine
    from shim.sandbox.guest_container import GuestContainer
    from shim.sandbox.sandbox import Sandbox

log = logging.getLogger(__name__)

MIB = 1 << 20


class PodParking:
    """The parking of one pod.

    :param sandbox: its machine's life.
    :param guests: lists its containers in the guest.
    :param note: reports an event to the sandbox's followers: its topic and one line.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        guests: Callable[[], Iterable[GuestContainer]],
        *,
        note: Note,
    ) -> None:
        self._sandbox = sandbox
        self._guests = guests
        self._note = note
        self._running: RunningMachine | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: The containers that were paused to park the pod.
        self._paused: list[GuestContainer] = []
        sandbox.while_running(self._begin, name="parking")

    async def _begin(self, running: RunningMachine) -> None:
        self._running = running
        running.agent.gate.wake = self.wake
        self.consider()

    @property
    def condition(self) -> str:
        """The state of the sandbox in one word: of its machine's life, or of its parking."""
        rest = self._running.parking.rest if self._running is not None else Rest.AWAKE
        is_awake = rest is Rest.AWAKE or self._sandbox.state is not Life.RUNNING
        return self._sandbox.state.name.lower() if is_awake else rest.name.lower()

    def consider(self) -> None:
        """Start or stop the timer, after a container was paused, resumed or created, or has ended."""
        self._paused = [one for one in self._paused if one.init.state is State.PAUSED]
        running = self._running
        if running is None or not running.park_after_s or not self._is_idle():
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None and running.parking.rest is Rest.AWAKE:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(running.park_after_s, self._overdue)

    async def park(self) -> RunningMachine:
        """Pause what runs and park the machine.

        :returns: the machine.
        :raises FailedPrecondition: if it cannot be parked; what was paused for that runs again.
        :raises ShimError: if there is no machine.
        """
        return await self._sandbox.work.finish(self._pause_and_park())

    async def unpark(self) -> None:
        """Wake the machine and resume the containers that were paused to park it.

        :raises ShimError: if it does not wake.
        """
        await self._sandbox.running()
        await self._sandbox.work.finish(self._resume())

    async def release(self, container: GuestContainer) -> None:
        """Wake the machine for a signal, and resume the container if it was only paused to park the pod.

        :raises ShimError: if it does not wake.
        """
        await self._sandbox.running()
        if container in self._paused:
            self._paused.remove(container)
            await _resumed(container)

    async def wake(self) -> None:
        """Wake the machine if it is parked; its containers stay paused.

        :raises ShimError: if it does not wake.
        """
        await self._sandbox.work.finish(self._wake())

    def _is_idle(self) -> bool:
        states = {one.init.state for one in self._guests()}
        return State.PAUSED in states and states <= {State.PAUSED, State.STOPPED}

    def _overdue(self) -> None:
        self._timer = None
        self._sandbox.work.spawn(self._park_when_idle(), name="park")

    async def _park_when_idle(self) -> None:
        machine = await self._sandbox.running(awake=False)
        if not self._is_idle():
            return
        try:
            await self._park(machine)
        except ShimError as error:
            log.warning("park: sandbox %s: %s", self._sandbox.id, error)

    async def _pause_and_park(self) -> RunningMachine:
        machine = await self._sandbox.running(awake=False)
        waiting = [one.id for one in self._guests() if one.init.state is State.CREATED]
        if waiting:
            raise FailedPrecondition(
                f"park: container {waiting[0]} is not started yet; start or delete it first"
            )
        try:
            for one in self._guests():
                if one.init.state is State.RUNNING:
                    await one.pause()
                    self._paused.append(one)
            await self._park(machine)
        except BaseException:
            with contextlib.suppress(ShimError):  # the machine may be gone, which the first error says
                await self._resume()
            raise
        return machine

    async def _park(self, machine: RunningMachine) -> None:
        for one in self._guests():
            await one.remember()
        took_s = await machine.parking.park()
        if took_s is not None:
            latency.SHIM.observe("park", took_s)
            self._note(event_feed.PARKED, text=f"{machine.parking.memory_bytes // MIB} MiB moved to a file")

    async def _resume(self) -> None:
        paused, self._paused = self._paused, []
        for one in paused:
            await _resumed(one)

    async def _wake(self) -> None:
        took_s = await (await self._sandbox.running(awake=False)).parking.wake()
        if took_s is not None:
            latency.SHIM.observe("wake", took_s)
            self._note(event_feed.AWAKE, text=f"after {took_s:.2f} s")
            self.consider()


class Note(Protocol):
    """Notes an event; see :meth:`shim.telemetry.event_feed.EventFeed.note`."""

    def __call__(self, topic: str, *, text: str) -> None:
        """Note it."""


async def _resumed(container: GuestContainer) -> None:
    """Resume a container that has neither ended nor been resumed meanwhile."""
    if container.init.state is State.PAUSED:
        await container.resume()

"""Parks an idle machine: moves its memory to a file, and back when it is needed.

The guest frees its caches, the gate in front of it closes, the machine stops, and its memory is moved. Waking
does the reverse, and sets the guest's clock. See ``docs/design/parking.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

from hypervisor import HypervisorError, ParkedMemoryLostError
from shim.errors import FailedPrecondition, ResourceExhausted, ShimError, Unavailable
from shim.host import unnamed_file
from shim.machine import clock
from shim.machine.rest import Rest, RestInput, following

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hypervisor import Hypervisor
    from shim.agent.client import Agent

log = logging.getLogger(__name__)

MIB = 1 << 20

QUIET_TIMEOUT_S = 15.0  # for pending requests to be answered
CLOCK_TIMEOUT_S = 5.0  # usually it takes milliseconds


class Parking:
    """The rest of one machine.

    :param vm: the virtual machine.
    :param agent: its agent.
    :param directory: where the file of its memory is made.
    :param switch_off: ends the machine, for a reason in one line.
    """

    def __init__(
        self,
        vm: Hypervisor,
        agent: Agent,
        *,
        directory: str,
        switch_off: Callable[[str], Awaitable[None]],
    ) -> None:
        self.rest = Rest.AWAKE
        #: How much memory is in the file, in bytes; 0 if it is not parked.
        self.memory_bytes = 0
        self._vm = vm
        self._agent = agent
        self._directory = directory
        self._switch_off = switch_off
        self._lock = asyncio.Lock()

    @property
    def is_awake(self) -> bool:
        """Whether a request to the guest would not wake its machine."""
        return not self._agent.gate.is_closed

    async def park(self) -> float | None:
        """Park the machine; once begun, this must be finished.

        :returns: how long it took, in seconds; None if the machine was already parked.
        :raises FailedPrecondition: if it cannot be parked; it continues as before.
        """
        async with self._lock:
            if self.rest is Rest.PARKED:
                return None
            self._apply(RestInput.PARK)
            began_s = time.monotonic()
            try:
                self._agent.gate.hold()
                await self._park()
            except (ShimError, HypervisorError, OSError, TimeoutError) as error:
                self._apply(RestInput.FAILED)
                self._agent.gate.open()
                raise FailedPrecondition(f"park: the machine goes on in memory: {_cause(error)}") from error
            self._apply(RestInput.DONE)
            took_s = time.monotonic() - began_s
            log.info("park: %d MiB moved to a file in %.2f s", self.memory_bytes // MIB, took_s)
            return took_s

    async def wake(self) -> float | None:
        """Wake the machine; once begun, this must be finished.

        :returns: how long it took, in seconds; None if it was awake.
        :raises ResourceExhausted: if that fails; the machine is still parked.
        :raises Unavailable: if its memory is lost; the machine ends.
        """
        async with self._lock:
            if self.rest is Rest.AWAKE:
                return None
            self._apply(RestInput.WAKE)
            began_s = time.monotonic()
            try:
                await self._vm.unpark()
            except ParkedMemoryLostError as error:
                self._apply(RestInput.MEMORY_LOST)
                await self._switch_off(str(error))
                raise Unavailable(f"wake: {error}; the machine is switched off") from error
            except HypervisorError as error:
                self._apply(RestInput.FAILED)
                raise ResourceExhausted(f"wake: it is still parked: {error}; try again") from error
            self._apply(RestInput.DONE)
            self.memory_bytes = 0
            self._agent.gate.admit()
            await self._set_clock()
            self._agent.gate.open()
            took_s = time.monotonic() - began_s
            log.info("wake: the machine goes on after %.2f s", took_s)
            return took_s

    async def _park(self) -> None:
        if self._agent.is_hako:
            with contextlib.suppress(ShimError):  # it only makes the file smaller
                await self._agent.drop_caches()
        file = await asyncio.to_thread(unnamed_file.make, self._directory)
        try:
            async with asyncio.timeout(QUIET_TIMEOUT_S):
                await self._agent.gate.close()
            self.memory_bytes = await self._vm.park(file)
        finally:
            os.close(file)

    async def _set_clock(self) -> None:
        try:
            async with asyncio.timeout(CLOCK_TIMEOUT_S):
                await clock.set_right(self._agent)
        except (ShimError, TimeoutError) as error:
            log.warning("wake: the guest's clock is not right yet: %s", error or "it does not answer in time")

    def _apply(self, happening: RestInput) -> None:
        self.rest = following(self.rest, happening)


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return f"{error.filename or 'host'}: {error.strerror}"
    if isinstance(error, TimeoutError):
        return f"requests to its guest are not answered within {QUIET_TIMEOUT_S:g} s"
    return str(error)

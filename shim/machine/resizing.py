"""Gives a running machine the size that its containers need, and lets the guest use it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from hypervisor import ResizeError, ResizeRefusedError
from shim.errors import ResourceExhausted
from shim.machine.limits import cpuset_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypervisor import Hypervisor
    from shim.agent.client import Agent
    from shim.machine.limits import Limits
    from shim.machine.sizing import Plan, Size

log = logging.getLogger(__name__)

MIB = 1 << 20


class Resizer:
    """The size of one machine.

    :param vm: the machine.
    :param plan: its least and its greatest size.
    :param size: its current size; a clone may be smaller than wanted.
    :param limit_memory: called with the guest's memory, in bytes, before it grows and after it has shrunk.
    """

    def __init__(
        self, vm: Hypervisor, plan: Plan, *, size: Size, limit_memory: Callable[[int], None]
    ) -> None:
        self._vm = vm
        self._limit_memory = limit_memory
        self._plan = plan
        self._size = size
        self._pinned: tuple[frozenset[int], int] = (frozenset(), size.vcpus)
        self._lock = asyncio.Lock()

    @property
    def size(self) -> Size:
        """The current size of the machine."""
        return self._size

    async def grow(self, agent: Agent, live: Iterable[Limits]) -> None:
        """Make the machine large enough.

        :param agent: its agent.
        :param live: the limits of each of its containers.
        :raises ResourceExhausted: if that exceeds its maximum, or QEMU or the guest refuses.
        :raises ShimError: if the guest cannot use the new parts.
        """
        live = list(live)
        if problem := self._plan.lack_of_huge_pages(live):
            raise ResourceExhausted(f"grow: {problem}")
        wanted = self._plan.wanted(live)
        async with self._lock:
            try:
                if wanted.vcpus > self._size.vcpus:
                    await self._set_vcpus(agent, wanted.vcpus)
                if wanted.memory_bytes > self._size.memory_bytes:
                    await agent.online_memory()
                    await self._set_memory(wanted.memory_bytes)
                    await agent.online_memory()
            except ResizeError as error:
                raise ResourceExhausted(str(error)) from error
            await self._pin(cpuset_of(live))

    async def shrink(self, agent: Agent, live: Iterable[Limits]) -> None:
        """Make the machine no larger than necessary; if the guest refuses, that is logged.

        :param agent: its agent.
        :param live: the limits of each of its containers.
        :raises ShimError: if the guest does not answer.
        """
        live = list(live)
        wanted = self._plan.wanted(live)
        async with self._lock:
            try:
                if wanted.vcpus < self._size.vcpus:
                    await self._set_vcpus(agent, wanted.vcpus)
            except ResizeError as error:
                log.warning("%s", error)
            try:
                if wanted.memory_bytes < self._size.memory_bytes:
                    await self._set_memory(wanted.memory_bytes)
                    if agent.is_hako:
                        await agent.follow_limits()
            except ResizeError as error:
                log.warning("%s", error)
            await self._pin(cpuset_of(live))

    async def _pin(self, cpus: frozenset[int]) -> None:
        """Pin the machine to the containers' processors; a failure only costs speed, so it is just logged."""
        if (cpus, self._size.vcpus) == self._pinned or not (cpus or self._pinned[0]):
            return
        try:
            await self._vm.pin_vcpus(cpus)
        except ResizeError as error:
            log.warning("%s", error)
        self._pinned = (cpus, self._size.vcpus)

    async def _set_vcpus(self, agent: Agent, count: int) -> None:
        is_more = count > self._size.vcpus
        try:
            reached = await self._vm.resize_vcpus(count)
        except ResizeRefusedError as error:
            self._size = replace(self._size, vcpus=error.reached)
            raise
        if is_more or reached > count:
            await agent.use_cpus(count)
        self._size = replace(self._size, vcpus=count)
        log.info("resize: %d vCPUs in use of %d", count, reached)

    async def _set_memory(self, size: int) -> None:
        self._limit_memory(max(size, self._size.memory_bytes))
        try:
            reached = await self._vm.resize_memory(size)
        except ResizeRefusedError as error:
            self._size = replace(self._size, memory_bytes=error.reached)
            self._limit_memory(error.reached)
            raise
        self._limit_memory(reached)
        self._size = replace(self._size, memory_bytes=size)
        log.info("resize: %d MiB of memory", reached // MIB)

"""The size of a sandbox's machine: a pure function of the configuration and the live containers.

The size is always computed from the live containers, never from an earlier size.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from shim.machine.limits import NO_LIMITS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.config import HypervisorConfig
    from shim.machine.limits import Limits

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a machine.

    :param vcpus: virtual CPUs.
    :param memory_bytes: memory.
    """

    vcpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a machine at its start, and how it may grow.

    :param base: its own part, without the containers' limits.
    :param boot: its size at the start, which is also its least size.
    :param most: its greatest size.
    """

    base: Size
    boot: Size
    most: Size

    def wanted(self, live: Iterable[Limits]) -> Size:
        """Compute the size for the live containers.

        :param live: the limits of each.
        """
        return _at_most(self.most, _at_least(self.boot, _with(self.base, live)))

    def lack_of_huge_pages(self, live: Iterable[Limits]) -> str:
        """Check that the containers' huge pages fit: unlike memory, they are reserved.

        :param live: the limits of each.
        :returns: why they do not fit, in one line; empty if they do.
        """
        wanted = sum(each.huge_bytes for each in live)
        room = max(self.most.memory_bytes, self.boot.memory_bytes) - self.base.memory_bytes
        if wanted <= room:
            return ""
        return (
            f"hugepageLimits: {wanted // MIB} MiB of huge pages, and the virtual machine has room for "
            f"{room // MIB} MiB; lower the limits or raise [hypervisor] max_memory_mib"
        )


def plan(config: HypervisorConfig, *, pod: Limits = NO_LIMITS, first: Limits = NO_LIMITS) -> Plan:
    """Decide the size of a machine at its start.

    If the CRI announces the size of a pod, its machine starts with that size, and no container waits for it
    to grow. With static sizing, the limits of the first container count, too, and the size never changes.

    :param config: the operator's.
    :param pod: the limits of the whole pod, as far as they are known.
    :param first: the limits of the sandbox's first container.
    """
    base = Size(vcpus=config.vcpus, memory_bytes=config.memory_mib * MIB)
    most = _at_least(
        base,
        Size(
            vcpus=config.max_vcpus or os.cpu_count() or 1,
            memory_bytes=(config.max_memory_mib * MIB) or _host_memory(),
        ),
    )
    known = pod.or_more(first) if config.static_sizing else pod
    boot = _at_most(most, _with(base, [known]))
    return Plan(base=base, boot=boot, most=boot if config.static_sizing else most)


def _with(base: Size, live: Iterable[Limits]) -> Size:
    limits = list(live)
    memory_bytes = sum(each.memory_bytes + each.huge_bytes for each in limits)
    return Size(
        vcpus=base.vcpus + math.ceil(sum(each.cpus for each in limits)),
        memory_bytes=base.memory_bytes + math.ceil(Fraction(memory_bytes, MIB)) * MIB,
    )


def _at_least(least: Size, size: Size) -> Size:
    return Size(vcpus=max(least.vcpus, size.vcpus), memory_bytes=max(least.memory_bytes, size.memory_bytes))


def _at_most(most: Size, size: Size) -> Size:
    return Size(vcpus=min(most.vcpus, size.vcpus), memory_bytes=min(most.memory_bytes, size.memory_bytes))


def _host_memory() -> int:
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return size - size % MIB

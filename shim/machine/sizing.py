"""How large a sandbox's machine has to be: a pure function of the configuration and of its live containers.

The size is computed anew from what there is each time, never by adding to what was computed before.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from shim.machine.pod import is_pause

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shim.config import HypervisorConfig

MIB = 1 << 20

_DEFAULT_PERIOD_US = 100_000  # the kernel's, of which a quota without a period is a part
_UNLIMITED = 1 << 60  # control groups show no limit as the largest number that they can hold
_SHARES_PER_CPU = 1024  # what Kubernetes gives a container that requests one processor
_CPU_LIST = re.compile(r"(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?")
_LEAST_SHARES = 2  # what it gives one that requests none

# What containerd's CRI says of a pod as a whole, as it was when the pod was made.
_QUOTA = "io.kubernetes.cri.sandbox-cpu-quota"
_PERIOD = "io.kubernetes.cri.sandbox-cpu-period"
_SHARES = "io.kubernetes.cri.sandbox-cpu-shares"
_MEMORY = "io.kubernetes.cri.sandbox-memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a machine.

    :param vcpus: virtual CPUs.
    :param memory_bytes: memory.
    """

    vcpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one container, or a pod, may use; 0 is no limit.

    :param quota_us: processor time in each period, in microseconds.
    :param period_us: the period, in microseconds.
    :param memory_bytes: memory.
    :param huge_bytes: huge pages, which do not count as that.
    :param cpuset: the host's processors it may run on; none for all.
    """

    quota_us: int = 0
    period_us: int = _DEFAULT_PERIOD_US
    memory_bytes: int = 0
    huge_bytes: int = 0
    cpuset: frozenset[int] = frozenset()

    @property
    def cpus(self) -> Fraction:
        """The processors that may be busy at once."""
        return Fraction(self.quota_us, self.period_us)

    def updated(self, resources: Mapping[str, Any]) -> Limits:
        """Apply an update; what it does not mention stays.

        :param resources: the ``linux.resources`` of an OCI specification, or a part of them.
        """
        cpu, memory = _table(resources.get("cpu")), _table(resources.get("memory"))
        return Limits(
            quota_us=_number(cpu.get("quota"), self.quota_us),
            period_us=_number(cpu.get("period"), self.period_us) or _DEFAULT_PERIOD_US,
            memory_bytes=_number(memory.get("limit"), self.memory_bytes),
            huge_bytes=_huge_bytes(resources.get("hugepageLimits"), self.huge_bytes),
            cpuset=_processors(cpu.get("cpus"), self.cpuset),
        )

    def or_more(self, other: Limits) -> Limits:
        """Choose the larger of each."""
        more = max(self, other, key=lambda limits: limits.cpus)
        return Limits(
            quota_us=more.quota_us,
            period_us=more.period_us,
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
            huge_bytes=max(self.huge_bytes, other.huge_bytes),
            cpuset=other.cpuset,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a machine starts with, and how it may grow.

    :param base: what it has for itself: the containers' limits come on top.
    :param boot: what it starts with, which is also the least it can have.
    :param most: what it can have.
    """

    base: Size
    boot: Size
    most: Size

    def wanted(self, live: Iterable[Limits]) -> Size:
        """Compute the size for the containers that there are.

        :param live: the limits of each.
        """
        return _at_most(self.most, _at_least(self.boot, _with(self.base, live)))

    def lack_of_huge_pages(self, live: Iterable[Limits]) -> str:
        """Tell whether a machine cannot have its containers' huge pages: those are set aside, unlike memory.

        :param live: the limits of each.
        :returns: why, in one line; empty if it can.
        """
        wanted = sum(each.huge_bytes for each in live)
        room = max(self.most.memory_bytes, self.boot.memory_bytes) - self.base.memory_bytes
        if wanted <= room:
            return ""
        return (
            f"hugepageLimits: {wanted // MIB} MiB of huge pages, and the virtual machine has room for "
            f"{room // MIB} MiB; lower the limits or raise [hypervisor] max_memory_mib"
        )


def limits_of(spec: Mapping[str, Any]) -> Limits:
    """Read a container's limits.

    :param spec: its OCI specification; what is malformed there is no limit here, and refused elsewhere.
    """
    return Limits().updated(_table(_table(spec.get("linux")).get("resources")))


def with_memory(live: Iterable[Limits], memory_bytes: int) -> list[Limits]:
    """Add memory that belongs to no container to what containers may use.

    :param live: the limits of each container.
    :param memory_bytes: the memory.
    """
    first, *others = [*live] or [Limits()]
    return [replace(first, memory_bytes=first.memory_bytes + memory_bytes), *others]


def cpuset_of(live: Iterable[Limits]) -> frozenset[int]:
    """Choose the host's processors for a machine: those of its containers, unless one may run on all.

    :param live: the limits of each container.
    """
    sets = [each.cpuset for each in live]
    return frozenset().union(*sets) if all(sets) else frozenset()


def limits_of_pod(annotations: Mapping[str, Any]) -> Limits:
    """Read what the CRI says of a whole pod.

    A pod without a quota gets as many processors as it requests.

    :param annotations: of its pause container.
    """
    quota_us, shares = _annotated(annotations, _QUOTA), _annotated(annotations, _SHARES)
    if not quota_us and shares > _LEAST_SHARES:
        return Limits(
            quota_us=shares, period_us=_SHARES_PER_CPU, memory_bytes=_annotated(annotations, _MEMORY)
        )
    return Limits(
        quota_us=quota_us,
        period_us=_annotated(annotations, _PERIOD) or _DEFAULT_PERIOD_US,
        memory_bytes=_annotated(annotations, _MEMORY),
    )


def plan(config: HypervisorConfig, oci: Mapping[str, Any]) -> Plan:
    """Decide what a machine starts with.

    A pod's size is known from the start if the CRI tells; then no container of it has to wait for the machine
    to grow. With static sizing, the size of a container that is alone is taken in as well, and nothing
    changes later.

    :param config: the operator's.
    :param oci: the specification of the sandbox's first container.
    """
    base = Size(vcpus=config.vcpus, memory_bytes=config.memory_mib * MIB)
    most = _at_least(
        base,
        Size(
            vcpus=config.max_vcpus or os.cpu_count() or 1,
            memory_bytes=(config.max_memory_mib * MIB) or _host_memory(),
        ),
    )
    known = [limits_of_pod(_table(oci.get("annotations")))]
    if config.static_sizing and not is_pause(dict(oci)):
        known = [known[0].or_more(limits_of(oci))]
    boot = _at_most(most, _with(base, known))
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


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object, otherwise: int) -> int:
    """Read a limit: one that is negative or huge is none, absent (or malformed) it changes nothing."""
    if not isinstance(value, int):
        return otherwise
    return value if 0 < value < _UNLIMITED else 0


def _huge_bytes(value: object, otherwise: int) -> int:
    """Add up the limits of all sizes of pages; absent (or malformed) they change nothing."""
    if not isinstance(value, list):
        return otherwise
    return sum(_number(_table(each).get("limit"), 0) for each in value)


def _processors(value: object, otherwise: frozenset[int]) -> frozenset[int]:
    """Read a list as cpuset(7) has it: ``0-2,5``; one that is absent (or malformed) changes nothing."""
    if not isinstance(value, str) or not _CPU_LIST.fullmatch(value.strip()):
        return otherwise
    found: set[int] = set()
    for part in filter(None, value.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _annotated(annotations: Mapping[str, Any], name: str) -> int:
    text = annotations.get(name)
    if not isinstance(text, str) or not (text.isascii() and text.isdigit()):
        return 0
    return int(text) if len(text) < len(str(_UNLIMITED)) else 0

"""The limits of a container or a pod, read once from its specification or its annotations. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_DEFAULT_PERIOD_US = 100_000  # the kernel's own, for a quota without a period
_UNLIMITED = 1 << 60  # cgroups write "no limit" as their largest number
_SHARES_PER_CPU = 1024  # Kubernetes' value for a container that requests one processor
_CPU_LIST = re.compile(r"(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?")
_LEAST_SHARES = 2  # Kubernetes' value for a container that requests none

# The annotations of a pause container with the limits of its whole pod.
_QUOTA = "io.kubernetes.cri.sandbox-cpu-quota"
_PERIOD = "io.kubernetes.cri.sandbox-cpu-period"
_SHARES = "io.kubernetes.cri.sandbox-cpu-shares"
_MEMORY = "io.kubernetes.cri.sandbox-memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one container or pod; 0 means no limit.

    :param quota_us: processor time in each period, in microseconds.
    :param period_us: the period, in microseconds.
    :param memory_bytes: memory.
    :param huge_bytes: huge pages, which do not count as memory.
    :param cpuset: the host's processors that it may run on; empty for all.
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
        """Apply an update; limits that it does not mention stay.

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
        """Choose the larger of each limit."""
        more = max(self, other, key=lambda limits: limits.cpus)
        return Limits(
            quota_us=more.quota_us,
            period_us=more.period_us,
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
            huge_bytes=max(self.huge_bytes, other.huge_bytes),
            cpuset=other.cpuset,
        )


NO_LIMITS = Limits()


def limits_of(spec: Mapping[str, Any]) -> Limits:
    """Read a container's limits.

    :param spec: its OCI specification; a malformed limit counts as no limit here, and is refused elsewhere.
    """
    return NO_LIMITS.updated(_table(_table(spec.get("linux")).get("resources")))


def with_memory(live: Iterable[Limits], memory_bytes: int) -> list[Limits]:
    """Add memory outside containers to the limits of containers.

    :param live: the limits of each container.
    :param memory_bytes: the memory.
    """
    first, *others = [*live] or [NO_LIMITS]
    return [replace(first, memory_bytes=first.memory_bytes + memory_bytes), *others]


def cpuset_of(live: Iterable[Limits]) -> frozenset[int]:
    """Choose the host's processors for a machine: those of its containers, unless one may run on all.

    :param live: the limits of each container.
    """
    sets = [each.cpuset for each in live]
    return frozenset().union(*sets) if all(sets) else frozenset()


def limits_of_pod(*, quota_us: int, period_us: int, shares: int, memory_bytes: int) -> Limits:
    """Combine the CRI's limits of a whole pod; a negative or huge number means no limit.

    A pod without a quota gets as many processors as it requests.

    :param quota_us: processor time in each period, in microseconds.
    :param period_us: the period, in microseconds; 0 for the kernel's own.
    :param shares: the weight that Kubernetes computes from the processors that the pod requests.
    :param memory_bytes: memory.
    """
    quota_us, shares, memory_bytes = (_number(each, 0) for each in (quota_us, shares, memory_bytes))
    if not quota_us and shares > _LEAST_SHARES:
        return Limits(quota_us=shares, period_us=_SHARES_PER_CPU, memory_bytes=memory_bytes)
    period_us = _number(period_us, 0) or _DEFAULT_PERIOD_US
    return Limits(quota_us=quota_us, period_us=period_us, memory_bytes=memory_bytes)


def annotated_limits(spec: Mapping[str, Any]) -> Limits:
    """Read the limits of a whole pod, which containerd's CRI writes into annotations.

    :param spec: the OCI specification of its pause container.
    """
    annotations = _table(spec.get("annotations"))
    return limits_of_pod(
        quota_us=_annotated(annotations, _QUOTA),
        period_us=_annotated(annotations, _PERIOD),
        shares=_annotated(annotations, _SHARES),
        memory_bytes=_annotated(annotations, _MEMORY),
    )


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object, otherwise: int) -> int:
    """Read a limit: negative or huge means no limit; absent or malformed changes nothing."""
    if not isinstance(value, int):
        return otherwise
    return value if 0 < value < _UNLIMITED else 0


def _huge_bytes(value: object, otherwise: int) -> int:
    """Add up the limits of all page sizes; absent or malformed ones change nothing."""
    if not isinstance(value, list):
        return otherwise
    return sum(_number(_table(each).get("limit"), 0) for each in value)


def _processors(value: object, otherwise: frozenset[int]) -> frozenset[int]:
    """Read a list in the format of cpuset(7): ``0-2,5``; an absent or malformed one changes nothing."""
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

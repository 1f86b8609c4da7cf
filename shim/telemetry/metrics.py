"""A container's statistics, from the guest's cgroup v2 to the message for the host's cgroup version.

The guest always has cgroup v2; containerd's consumers want the message of the *host's* mode. Pure:
values in, values out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from proto.containerd import cgroups_v1_pb2, cgroups_v2_pb2
from proto.kata import agent_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_NS_PER_US = 1000
# The value by which each version reports that memory has no limit; consumers take any other value for a
# limit.
_NO_LIMIT_V1 = (1 << 63) - (1 << 12)
_NO_LIMIT_V2 = (1 << 64) - 1
# memory.stat keys of cgroup v2 that the v2 message has fields for under the same name.
_V2_MEMORY_FIELDS = frozenset(field.name for field in cgroups_v2_pb2.MemoryStat.DESCRIPTOR.fields) - {
    "usage",
    "usage_limit",
    "swap_usage",
    "swap_limit",
    "max_usage",
    "swap_max_usage",
    "psi",
}
# cgroup v1 field -> key of cgroup v2's memory.stat that counts the same pages.
_V1_MEMORY = {
    "cache": "file",
    "rss": "anon",
    "rss_huge": "anon_thp",
    "mapped_file": "file_mapped",
    "dirty": "file_dirty",
    "writeback": "file_writeback",
    "pg_fault": "pgfault",
    "pg_maj_fault": "pgmajfault",
    "inactive_anon": "inactive_anon",
    "active_anon": "active_anon",
    "inactive_file": "inactive_file",
    "active_file": "active_file",
    "unevictable": "unevictable",
}
_IO_FIELDS = {"read": "rbytes", "write": "wbytes", "rios": "rios", "wios": "wios"}


def host_has_cgroup_v2(root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Tell whether the host runs the unified hierarchy: cgroups(7), ``cgroup.controllers`` at its root."""
    return (root / "cgroup.controllers").exists()


def total(containers: Iterable[agent_pb2.StatsContainerResponse]) -> agent_pb2.StatsContainerResponse:
    """Add up the usage of a pod's containers, without their limits.

    :param containers: the agent's statistics of each.
    """
    result = agent_pb2.StatsContainerResponse()
    cgroup = result.cgroup_stats
    cpu, memory = cgroup.cpu_stats.cpu_usage, cgroup.memory_stats
    transferred: dict[tuple[int, int, str], int] = {}
    for one in containers:
        used = one.cgroup_stats
        cpu.total_usage += used.cpu_stats.cpu_usage.total_usage
        cpu.usage_in_kernelmode += used.cpu_stats.cpu_usage.usage_in_kernelmode
        cpu.usage_in_usermode += used.cpu_stats.cpu_usage.usage_in_usermode
        memory.usage.usage += used.memory_stats.usage.usage
        for name, value in used.memory_stats.stats.items():
            memory.stats[name] += value
        cgroup.pids_stats.current += used.pids_stats.current
        for item in used.blkio_stats.io_service_bytes_recursive:
            key = (item.major, item.minor, item.op)
            transferred[key] = transferred.get(key, 0) + item.value
        if (
            not result.network_stats
        ):  # the interfaces belong to the machine, so every container reports the same numbers
            result.network_stats.extend(one.network_stats)
    for (major, minor, op), value in sorted(transferred.items()):
        cgroup.blkio_stats.io_service_bytes_recursive.add(major=major, minor=minor, op=op, value=value)
    return result


def to_metrics(
    stats: agent_pb2.StatsContainerResponse, *, unified: bool
) -> cgroups_v1_pb2.Metrics | cgroups_v2_pb2.Metrics:
    """Convert the agent's statistics.

    :param stats: the agent's statistics.
    :param unified: whether the host is in cgroup v2 mode.
    """
    return _to_v2(stats) if unified else _to_v1(stats)


def _to_v2(stats: agent_pb2.StatsContainerResponse) -> cgroups_v2_pb2.Metrics:
    cgroup = stats.cgroup_stats
    cpu = cgroup.cpu_stats
    return cgroups_v2_pb2.Metrics(
        pids=cgroups_v2_pb2.PidsStat(current=cgroup.pids_stats.current, limit=cgroup.pids_stats.limit),
        cpu=cgroups_v2_pb2.CPUStat(
            usage_usec=cpu.cpu_usage.total_usage // _NS_PER_US,
            user_usec=cpu.cpu_usage.usage_in_usermode // _NS_PER_US,
            system_usec=cpu.cpu_usage.usage_in_kernelmode // _NS_PER_US,
            nr_periods=cpu.throttling_data.periods,
            nr_throttled=cpu.throttling_data.throttled_periods,
            throttled_usec=cpu.throttling_data.throttled_time // _NS_PER_US,
        ),
        memory=_memory_v2(cgroup.memory_stats),
        io=cgroups_v2_pb2.IOStat(usage=_io_entries(stats)),
        hugetlb=[
            cgroups_v2_pb2.HugeTlbStat(
                current=entry.usage, max=entry.max_usage, failcnt=entry.failcnt, pagesize=size
            )
            for size, entry in sorted(cgroup.hugetlb_stats.items())
        ],
        network=[
            # The agent's message and both of containerd's use the same numbers for these fields.
            cgroups_v2_pb2.NetworkStat.FromString(link.SerializeToString())
            for link in stats.network_stats
        ],
    )


def _memory_v2(memory: agent_pb2.MemoryStats) -> cgroups_v2_pb2.MemoryStat:
    message = cgroups_v2_pb2.MemoryStat(
        usage=memory.usage.usage,
        usage_limit=memory.usage.limit or _NO_LIMIT_V2,
        max_usage=memory.usage.max_usage,
        swap_usage=memory.swap_usage.usage,
        swap_limit=memory.swap_usage.limit,
        swap_max_usage=memory.swap_usage.max_usage,
    )
    for name, value in memory.stats.items():
        if name in _V2_MEMORY_FIELDS:
            setattr(message, name, value)
    return message


def _io_entries(stats: agent_pb2.StatsContainerResponse) -> list[cgroups_v2_pb2.IOEntry]:
    entries: dict[tuple[int, int], cgroups_v2_pb2.IOEntry] = {}
    for item in stats.cgroup_stats.blkio_stats.io_service_bytes_recursive:
        device = (item.major, item.minor)
        entry = entries.setdefault(device, cgroups_v2_pb2.IOEntry(major=item.major, minor=item.minor))
        field = _IO_FIELDS.get(item.op.lower())
        if field is not None:
            setattr(entry, field, item.value)
    return list(entries.values())


def _to_v1(stats: agent_pb2.StatsContainerResponse) -> cgroups_v1_pb2.Metrics:
    cgroup = stats.cgroup_stats
    cpu = cgroup.cpu_stats
    return cgroups_v1_pb2.Metrics(
        pids=cgroups_v1_pb2.PidsStat(current=cgroup.pids_stats.current, limit=cgroup.pids_stats.limit),
        cpu=cgroups_v1_pb2.CPUStat(
            usage=cgroups_v1_pb2.CPUUsage(
                total=cpu.cpu_usage.total_usage,
                kernel=cpu.cpu_usage.usage_in_kernelmode,
                user=cpu.cpu_usage.usage_in_usermode,
                per_cpu=cpu.cpu_usage.percpu_usage,
            ),
            throttling=cgroups_v1_pb2.Throttle(
                periods=cpu.throttling_data.periods,
                throttled_periods=cpu.throttling_data.throttled_periods,
                throttled_time=cpu.throttling_data.throttled_time,
            ),
        ),
        memory=_memory_v1(cgroup.memory_stats),
        blkio=_block_io_v1(stats),
        hugetlb=[
            cgroups_v1_pb2.HugetlbStat(
                usage=entry.usage, max=entry.max_usage, failcnt=entry.failcnt, pagesize=size
            )
            for size, entry in sorted(cgroup.hugetlb_stats.items())
        ],
        network=[
            cgroups_v1_pb2.NetworkStat.FromString(link.SerializeToString()) for link in stats.network_stats
        ],
    )


def _memory_v1(memory: agent_pb2.MemoryStats) -> cgroups_v1_pb2.MemoryStat:
    stats: Mapping[str, int] = memory.stats
    usage = _memory_entry(memory.usage)
    usage.limit = min(usage.limit or _NO_LIMIT_V1, _NO_LIMIT_V1)
    message = cgroups_v1_pb2.MemoryStat(
        hierarchical_memory_limit=usage.limit,
        usage=usage,
        swap=_memory_entry(memory.swap_usage),
        kernel=_memory_entry(memory.kernel_usage),
    )
    for name, key in _V1_MEMORY.items():
        setattr(message, name, stats.get(key, 0))
        # A v1 consumer computes the working set from the totals of the hierarchy: the same in a guest.
        setattr(message, f"total_{name}", stats.get(key, 0))
    return message


def _memory_entry(data: agent_pb2.MemoryData) -> cgroups_v1_pb2.MemoryEntry:
    return cgroups_v1_pb2.MemoryEntry(
        limit=data.limit, usage=data.usage, max=data.max_usage, failcnt=data.failcnt
    )


def _block_io_v1(stats: agent_pb2.StatsContainerResponse) -> cgroups_v1_pb2.BlkIOStat:
    names = {"read": "Read", "write": "Write", "rios": "Read", "wios": "Write"}
    transferred: list[cgroups_v1_pb2.BlkIOEntry] = []
    operations: list[cgroups_v1_pb2.BlkIOEntry] = []
    for item in stats.cgroup_stats.blkio_stats.io_service_bytes_recursive:
        kind = item.op.lower()
        if kind not in names:
            continue
        entry = cgroups_v1_pb2.BlkIOEntry(
            op=names[kind], major=item.major, minor=item.minor, value=item.value
        )
        (operations if kind in {"rios", "wios"} else transferred).append(entry)
    return cgroups_v1_pb2.BlkIOStat(io_service_bytes_recursive=transferred, io_serviced_recursive=operations)

"""The total usage of a pod's containers."""

from __future__ import annotations

import pytest

from proto.containerd import cgroups_v1_pb2, cgroups_v2_pb2
from proto.kata import agent_pb2
from shim.telemetry.metrics import to_metrics, total


def measured(cpu_ns: int, memory: int, processes: int, read: int) -> agent_pb2.StatsContainerResponse:
    """Return an agent's report on one container."""
    stats = agent_pb2.StatsContainerResponse()
    cgroup = stats.cgroup_stats
    cgroup.cpu_stats.cpu_usage.total_usage = cpu_ns
    cgroup.memory_stats.usage.usage = memory
    cgroup.memory_stats.usage.limit = 2**63 - 1
    cgroup.memory_stats.stats["inactive_file"] = memory // 2
    cgroup.pids_stats.current = processes
    cgroup.blkio_stats.io_service_bytes_recursive.add(major=8, minor=0, op="read", value=read)
    stats.network_stats.add(name="eth0", rx_bytes=100)
    return stats


def test_containers_are_added_up_and_the_shared_network_is_counted_once() -> None:
    metrics = to_metrics(total([measured(3000, 100, 1, 5), measured(4000, 200, 2, 6)]), unified=True)
    assert isinstance(metrics, cgroups_v2_pb2.Metrics)
    assert metrics.cpu.usage_usec == 7
    assert metrics.memory.usage == 300
    assert metrics.memory.inactive_file == 150
    assert metrics.memory.usage_limit == 2**64 - 1
    assert metrics.pids.current == 3
    assert [(entry.major, entry.rbytes) for entry in metrics.io.usage] == [(8, 11)]
    assert [(link.name, link.rx_bytes) for link in metrics.network] == [("eth0", 100)]


def test_a_pod_without_containers_reports_zeros() -> None:
    metrics = to_metrics(total([]), unified=False)
    assert isinstance(metrics, cgroups_v1_pb2.Metrics)
    assert metrics.memory.usage.usage == 0


@pytest.mark.parametrize("limit", [0, 2**64 - 1])
def test_unlimited_memory_is_reported_in_the_hosts_kernels_way(limit: int) -> None:
    stats = agent_pb2.StatsContainerResponse()
    stats.cgroup_stats.memory_stats.usage.limit = limit
    one, two = (to_metrics(stats, unified=unified) for unified in (False, True))
    assert isinstance(one, cgroups_v1_pb2.Metrics)
    assert isinstance(two, cgroups_v2_pb2.Metrics)
    assert (one.memory.usage.limit, one.memory.hierarchical_memory_limit) == (2**63 - 4096, 2**63 - 4096)
    assert two.memory.usage_limit == 2**64 - 1

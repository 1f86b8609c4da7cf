"""Every metric by name; the docstring of its function says what it measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.benchmarks.boot import clone_over_cold, cold_over_bare
from scripts.benchmarks.busy import busy_host
from scripts.benchmarks.calls import exec_over_guest, grpc_state_ms, state_over_runc
from scripts.benchmarks.commands import delete_ms, start_over_runc
from scripts.benchmarks.crowds import burst_30, crowd_100, resident_60
from scripts.benchmarks.growth import growth_containers, growth_sandboxes, growth_streams, growth_volumes
from scripts.benchmarks.host_time import host_share
from scripts.benchmarks.jail import run_jail_over_off
from scripts.benchmarks.memory import pod_pss_mib, shim_pss_mib, shim_uss_mib
from scripts.benchmarks.net import (
    net_tcp_in,
    net_tcp_out,
    net_tcp_pods,
    net_tcp_trips,
    net_udp_in,
    net_udp_out,
    net_udp_pods,
    net_udp_trips,
)
from scripts.benchmarks.overhead import overhead_mib, overhead_millicpus
from scripts.benchmarks.parking import parked_mib, wake_over_start
from scripts.benchmarks.storage import (
    disk_random_read,
    disk_random_write,
    disk_read,
    disk_write,
    file_random_read,
    file_random_write,
    file_read,
    file_root_read,
    file_root_tree,
    file_root_write,
    file_tree,
    file_write,
)
from scripts.benchmarks.streams import exec_trips, stdin_over_channel, stdout_over_channel
from scripts.benchmarks.templates import run_template_over_cold, template_mib

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripts.benchmarks.harness import Samples
    from scripts.benchmarks.stage import Stage

BARE = "bare QEMU"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    :param measure: measures it, in as many rounds as the stage says.
    :param unit: the unit of its values.
    :param against: the baseline, in a word or two; empty if there is none.
    """

    measure: Callable[[Stage], Samples]
    unit: str
    against: str

    @property
    def name(self) -> str:
        """Its name, everywhere."""
        return self.measure.__name__


METRICS = {
    metric.name: metric
    for metric in (
        Metric(clone_over_cold, "s", "cold boot"),
        Metric(run_template_over_cold, "s", "no template"),
        Metric(run_jail_over_off, "s", "no jail"),
        Metric(cold_over_bare, "s", BARE),
        Metric(host_share, "ms", "runc"),
        Metric(start_over_runc, "ms", "runc"),
        Metric(delete_ms, "ms", "runc"),
        Metric(shim_pss_mib, "MiB", "everything off"),
        Metric(shim_uss_mib, "MiB", "everything off"),
        Metric(pod_pss_mib, "MiB", "everything off"),
        Metric(overhead_mib, "MiB", "idle"),
        Metric(overhead_millicpus, "m", "idle"),
        Metric(parked_mib, "MiB", "before parking"),
        Metric(wake_over_start, "s", "start of a clone"),
        Metric(template_mib, "MiB", ""),
        Metric(exec_over_guest, "ms", "in the guest"),
        Metric(state_over_runc, "ms", "runc"),
        Metric(grpc_state_ms, "ms", "ttrpc"),
        Metric(stdout_over_channel, "MiB/s", "bare channel"),
        Metric(stdin_over_channel, "MiB/s", "bare channel"),
        Metric(exec_trips, "trips/s", "bare channel"),
        Metric(burst_30, "s", "no loss"),
        Metric(crowd_100, "s", "the median"),
        Metric(resident_60, "%", ""),
        Metric(busy_host, "s", "no turns"),
        *(Metric(measure, "MiB/s", BARE) for measure in (disk_read, disk_write)),
        *(Metric(measure, "blocks/s", BARE) for measure in (disk_random_read, disk_random_write)),
        *(Metric(measure, "MiB/s", BARE) for measure in (file_read, file_write)),
        *(Metric(measure, "blocks/s", BARE) for measure in (file_random_read, file_random_write)),
        Metric(file_tree, "files/s", BARE),
        *(Metric(measure, "MiB/s", BARE) for measure in (file_root_read, file_root_write)),
        Metric(file_root_tree, "files/s", BARE),
        *(Metric(measure, "MiB/s", BARE) for measure in (net_tcp_out, net_tcp_in, net_tcp_pods)),
        Metric(net_tcp_trips, "trips/s", BARE),
        *(Metric(measure, "datagrams/s", BARE) for measure in (net_udp_out, net_udp_in, net_udp_pods)),
        Metric(net_udp_trips, "trips/s", BARE),
        *(
            Metric(measure, "s", "the first")
            for measure in (growth_sandboxes, growth_containers, growth_volumes, growth_streams)
        ),
    )
}

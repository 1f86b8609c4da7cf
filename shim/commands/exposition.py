"""A node's numbers as Prometheus' metrics: those of its sandboxes, and those from their journal.

Names that begin with ``kata_`` are Kata's and mean the same; Hako's own begin with ``hako_``.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from hypervisor import SHARE_DAEMON
from shim.telemetry.latency import BOUNDS_MS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from proto.hako.metrics_pb2 import ReadResponse
    from shim.host.process_usage import ProcessDetails

SANDBOX_LABELS = ("sandbox_id", "cri_uid", "cri_name", "cri_namespace")
START_BOUNDS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
PHASE_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

_OF_GUEST = ("kata_guest_", "kata_agent_")
_MOST_GUEST_SAMPLES, _MOST_GUEST_LABELS, _LONGEST_LABEL = 2000, 4, 100
_MOST_LABELS_OF_JOURNAL = 200
#: Kata's names for the processes of a sandbox.
_KATA_PROCESSES = {"shim": "shim", "QEMU": "hypervisor", SHARE_DAEMON: "virtiofsd"}


class _Buckets:
    """A histogram that is filled by one reader."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        place = next((place for place, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += 1
        self.sum += value


class History:
    """The events on a node, added up from the entries of its journal."""

    def __init__(self) -> None:
        self._starts: dict[str, _Buckets] = defaultdict(lambda: _Buckets(START_BOUNDS_S))
        self._phases: dict[tuple[str, str, str], _Buckets] = defaultdict(lambda: _Buckets(PHASE_BOUNDS_S))
        self._containers = _Buckets(START_BOUNDS_S)
        self._failures: Counter[tuple[str, str]] = Counter()
        self._templates: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count an entry, unless it is malformed."""
        try:
            match entry["kind"]:
                case "start":
                    how = str(entry["how"])
                    self._starts[how].observe(float(entry["took_s"]))
                    for lane, name, took_s in entry["phases"]:
                        key = (how, str(lane), str(name))
                        if key in self._phases or len(self._phases) < _MOST_LABELS_OF_JOURNAL:
                            self._phases[key].observe(float(took_s))
                    if entry["template"]:
                        self._templates[str(entry["template"])] += 1
                case "container":
                    self._containers.observe(float(entry["took_s"]))
                case "failure":
                    self._failures[str(entry["phase"]), str(entry["cause"])] += 1
                case "end":
                    for kind, count in entry["dropped"].items():
                        self._dropped[str(kind)] += int(count)
        except (KeyError, TypeError, ValueError, AttributeError):
            return

    def metrics(self) -> Iterator[Metric]:
        """Yield the sums as metrics."""
        starts = HistogramMetricFamily(
            "hako_sandbox_start_seconds", "From the request until the machine answers.", labels=["how"]
        )
        for how, buckets in self._starts.items():
            _add(starts, (how,), buckets.bounds, buckets.counts, buckets.sum)
        yield starts
        phases = HistogramMetricFamily(
            "hako_sandbox_start_phase_seconds",
            "The phases of a start, as in the timeline.",
            labels=["how", "lane", "phase"],
        )
        for labels, buckets in self._phases.items():
            _add(phases, labels, buckets.bounds, buckets.counts, buckets.sum)
        yield phases
        containers = HistogramMetricFamily(
            "hako_container_start_seconds", "Create and Start of a container, the machine's start included."
        )
        _add(containers, (), self._containers.bounds, self._containers.counts, self._containers.sum)
        yield containers
        yield _counter("hako_failures", "Failures by phase and cause.", ("phase", "cause"), self._failures)
        hits, misses = self._templates["hit"], self._templates["miss"]
        yield _counter("hako_template_hits", "Machines that were cloned.", (), {(): hits})
        yield _counter("hako_template_misses", "Machines that could not be cloned.", (), {(): misses})
        yield _counter(
            "hako_ended_dropped",
            "Data that ended sandboxes had dropped.",
            ("kind",),
            {(kind,): count for kind, count in self._dropped.items()},
        )


def sandbox_metrics(
    replies: Iterable[ReadResponse], processes: Mapping[int, ProcessDetails]
) -> Iterator[Metric]:
    """Yield the metrics of the sandboxes that have answered.

    :param replies: the answers of their shims.
    :param processes: the host kernel's numbers of their processes, by id.
    """
    families = _Families()
    for reply in replies:
        labels = (reply.id, reply.pod.uid, reply.pod.name, reply.pod.namespace)
        families.gauge(
            "hako_sandbox_info", "A sandbox.", labels, namespace=reply.namespace, version=reply.version
        )
        for state, count in sorted(reply.containers.items()):
            families.gauge("hako_containers", "Containers.", labels, count, state=state)
        _add_processes(families, labels, reply, processes)
        for used in reply.usage:
            of = {"container_id": used.id}
            families.counter(
                "hako_container_cpu_seconds",
                "Processor time, as counted by the guest.",
                labels,
                used.cpu_s,
                **of,
            )
            families.gauge(
                "hako_container_memory_bytes",
                "Memory, as counted by the guest.",
                labels,
                used.memory_bytes,
                **of,
            )
            families.gauge(
                "hako_container_processes", "Processes in the container.", labels, used.processes, **of
            )
        for kind, dropped in sorted(reply.dropped.items()):
            families.counter(
                "hako_dropped",
                "Data that was dropped because there was too much.",
                labels,
                dropped,
                kind=kind,
            )
        for name, text, label, histograms in (
            ("kata_shim_rpc", "Calls from containerd to the shim.", "action", reply.shim_calls),
            ("kata_shim_agent_rpc", "Calls from the shim to the agent.", "action", reply.agent_calls),
            ("hako_qmp", "Commands from the shim to QEMU.", "command", reply.qmp_calls),
        ):
            family = families.histogram(f"{name}_durations_histogram_milliseconds", text, label)
            for each in histograms:
                _add(family, (*labels, each.name), BOUNDS_MS, each.buckets, each.sum_ms)
        _add_guest(families, labels, reply.guest)
    yield from families.all.values()


def _add_processes(
    families: _Families, labels: tuple[str, ...], reply: ReadResponse, processes: Mapping[int, ProcessDetails]
) -> None:
    on_host_s, on_host_bytes = 0.0, 0
    for process in reply.processes:
        numbers = processes.get(process.pid)
        if numbers is None:  # it has just ended
            continue
        on_host_s += numbers.usage.cpu_s
        on_host_bytes += numbers.usage.memory_bytes
        of = {"process": process.name}
        families.counter("hako_process_cpu_seconds", "Processor time.", labels, numbers.usage.cpu_s, **of)
        families.gauge(
            "hako_process_memory_bytes",
            "Memory: own pages, and a share of common pages (PSS).",
            labels,
            numbers.usage.memory_bytes,
            **of,
        )
        kata = _KATA_PROCESSES.get(process.name)
        if kata is None:
            continue
        families.gauge(f"kata_{kata}_threads", "Threads.", labels, numbers.threads)
        families.gauge(f"kata_{kata}_fds", "Open descriptors.", labels, numbers.descriptors)
        for table, values in (
            ("proc_status", numbers.status),
            ("proc_stat", numbers.stat),
            ("io_stat", numbers.io),
        ):
            for item, value in values.items():
                families.gauge(
                    f"kata_{kata}_{table}", f"From /proc/PID/{table[-6:]}.", labels, value, item=item
                )
    if reply.usage:
        families.gauge(
            "kata_shim_pod_overhead_memory_in_bytes",
            "Memory of the sandbox's processes on the host beyond that of its containers.",
            labels,
            on_host_bytes - sum(each.memory_bytes for each in reply.usage),
        )
        families.gauge(
            "hako_pod_overhead_cpu_seconds",
            "Processor time of the sandbox's processes on the host beyond that of its containers.",
            labels,
            on_host_s - sum(each.cpu_s for each in reply.usage),
        )


def _add_guest(families: _Families, labels: tuple[str, ...], text: str) -> None:
    """Add the well-formed parts of the agent's report; the guest is not trusted."""
    try:
        samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(_OF_GUEST)
            and not {*SANDBOX_LABELS} & {*sample.labels}
            and len(sample.labels) <= _MOST_GUEST_LABELS
            and all(len(value) <= _LONGEST_LABEL for value in sample.labels.values())
            and not math.isnan(sample.value)
        ]
    except (ValueError, KeyError, IndexError):
        return
    for sample in samples[:_MOST_GUEST_SAMPLES]:
        if families.takes(sample.name, sample.labels):
            families.gauge(sample.name, "From the guest.", labels, sample.value, **sample.labels)


class _Families:
    """Metric families by name, each with the samples of all sandboxes."""

    def __init__(self) -> None:
        self.all: dict[str, Any] = {}
        self._labels: dict[str, tuple[str, ...]] = {}

    def gauge(self, name: str, text: str, labels: tuple[str, ...], value: float = 1, **more: str) -> None:
        self._of(GaugeMetricFamily, name, text, more).add_metric([*labels, *more.values()], value)

    def counter(self, name: str, text: str, labels: tuple[str, ...], value: float, **more: str) -> None:
        self._of(CounterMetricFamily, name, text, more).add_metric([*labels, *more.values()], value)

    def histogram(self, name: str, text: str, label: str) -> HistogramMetricFamily:
        found: HistogramMetricFamily = self._of(HistogramMetricFamily, name, text, {label: ""})
        return found

    def _of(self, kind: Any, name: str, text: str, more: Mapping[str, str]) -> Any:
        if name not in self.all:
            self.all[name] = kind(name, text, labels=[*SANDBOX_LABELS, *more])
            self._labels[name] = tuple(more)
        return self.all[name]

    def takes(self, name: str, labels: Iterable[str]) -> bool:
        """Tell whether a sample's labels fit the family of its name."""
        return self._labels.get(name, tuple(labels)) == tuple(labels)


def _add(
    family: HistogramMetricFamily,
    labels: Sequence[str],
    bounds: Sequence[float],
    counts: Sequence[int],
    total: float,
) -> None:
    running, buckets = 0, []
    for bound, count in zip((*bounds, math.inf), counts, strict=True):
        running += count
        buckets.append(("+Inf" if bound == math.inf else str(bound), running))
    family.add_metric(list(labels), buckets, total)


def _counter(name: str, text: str, labels: Sequence[str], counts: Mapping[Any, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=list(labels))
    for values, count in sorted(counts.items()):
        family.add_metric(list(values), count)
    return family

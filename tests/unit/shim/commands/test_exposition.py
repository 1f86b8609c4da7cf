"""Prometheus' own parser reads the metrics, and the dashboard shows only metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from hypervisor import SHARE_DAEMON
from proto.hako.metrics_pb2 import ReadResponse
from shim.commands.exposition import History, sandbox_metrics
from shim.host.process_usage import ProcessDetails, ProcessUsage
from shim.telemetry.latency import BOUNDS_MS

ROOT = Path(__file__).resolve().parents[4]
DASHBOARD = ROOT / "docs/grafana-dashboard.json"
#: The metrics of the monitor itself, with their labels.
OF_THE_SCRAPE: dict[str, set[str]] = {
    "hako_sandbox_up": {"sandbox_id", "namespace"},
    "hako_sandbox_missing": {"sandbox_id", "namespace", "missing", "reason"},
    "hako_sandboxes": {"state"},
    "kata_monitor_running_shim_count": set(),
    "kata_monitor_scrape_total": set(),
    "kata_monitor_scrape_failed_total": set(),
}
START = {
    "kind": "start",
    "how": "clone",
    "took_s": 0.25,
    "template": "hit",
    "phases": [["machine", "clone goes on", 0.1]],
}
NUMBERS = ProcessDetails(
    usage=ProcessUsage(memory_bytes=1000, resident_bytes=2000, cpu_s=2.5),
    threads=3,
    descriptors=4,
    status={"vmrss": 5},
    stat={"utime": 6},
    io={"rchar": 7},
)


def reply(**changes: Any) -> ReadResponse:
    buckets = [0] * (len(BOUNDS_MS) + 1)
    buckets[2], buckets[-1] = 3, 1
    calls = [ReadResponse.Histogram(name="Create", buckets=buckets, sum_ms=900.0)]
    fields: dict[str, Any] = {
        "id": "one",
        "namespace": "k8s.io",
        "pod": ReadResponse.Pod(name="web", namespace="shop", uid="u-1"),
        "processes": [
            ReadResponse.Process(name="shim", pid=1),
            ReadResponse.Process(name="QEMU", pid=2),
            ReadResponse.Process(name=SHARE_DAEMON, pid=3),
        ],
        "containers": {"running": 2},
        "usage": [ReadResponse.ContainerUsage(id="c", memory_bytes=300, cpu_s=0.5, processes=2)],
        "guest": 'kata_guest_meminfo{item="memtotal"} 5e8\n',
        "shim_calls": calls,
        "agent_calls": calls,
        "qmp_calls": calls,
        "dropped": {"console": 9},
    }
    return ReadResponse(**fields | changes)


class _Given(Collector):
    def __init__(self, *replies: ReadResponse, journal: tuple[dict[str, Any], ...] = ()) -> None:
        self._replies = replies
        self._history = History()
        for entry in journal:
            self._history.add(entry)

    def collect(self) -> Any:
        yield from sandbox_metrics(self._replies, dict.fromkeys((1, 2, 3), NUMBERS))
        yield from self._history.metrics()


def samples(*replies: ReadResponse, journal: tuple[dict[str, Any], ...] = ()) -> dict[str, dict[str, float]]:
    """Return what Prometheus sees: values by name, then by labels."""
    registry = CollectorRegistry()
    registry.register(_Given(*replies, journal=journal))
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), (sample.name, labels)
            found[sample.name][labels] = sample.value
    return found


POD = "cri_name=web,cri_namespace=shop,cri_uid=u-1"


def test_a_sandboxs_metrics_carry_its_labels() -> None:
    found = samples(reply())

    assert found["hako_containers"] == {f"{POD},sandbox_id=one,state=running": 2}
    assert found["hako_process_memory_bytes"][f"{POD},process=QEMU,sandbox_id=one"] == 1000
    assert found["kata_hypervisor_threads"] == {f"{POD},sandbox_id=one": 3}
    assert found["kata_virtiofsd_proc_status"] == {f"{POD},item=vmrss,sandbox_id=one": 5}
    assert found["kata_shim_pod_overhead_memory_in_bytes"] == {f"{POD},sandbox_id=one": 2700}
    assert found["kata_guest_meminfo"] == {f"{POD},item=memtotal,sandbox_id=one": 5e8}


def test_calls_are_histograms_with_cumulative_buckets() -> None:
    found = samples(reply())["kata_shim_rpc_durations_histogram_milliseconds_bucket"]

    assert found[f"action=Create,{POD},le=2.0,sandbox_id=one"] == 0
    assert found[f"action=Create,{POD},le=4.0,sandbox_id=one"] == 3
    assert found[f"action=Create,{POD},le=+Inf,sandbox_id=one"] == 4


def test_the_journal_counts_starts_failures_and_templates() -> None:
    failure = {"kind": "failure", "phase": "boot", "cause": "DeadlineExceeded"}
    cold = START | {"how": "cold", "template": "miss", "took_s": 5.5}
    end = {"kind": "end", "dropped": {"events": 3}}
    container = {"kind": "container", "took_s": 0.4}

    found = samples(journal=(START, START, cold, failure, container, end))

    assert found["hako_sandbox_start_seconds_count"] == {"how=clone": 2, "how=cold": 1}
    assert found["hako_sandbox_start_seconds_bucket"]["how=clone,le=0.2"] == 0
    assert found["hako_sandbox_start_seconds_bucket"]["how=clone,le=0.3"] == 2
    phase = "how=clone,lane=machine,phase=clone goes on"
    assert found["hako_sandbox_start_phase_seconds_count"][phase] == 2
    assert found["hako_container_start_seconds_count"] == {"": 1}
    assert found["hako_failures_total"] == {"cause=DeadlineExceeded,phase=boot": 1}
    assert (found["hako_template_hits_total"], found["hako_template_misses_total"]) == ({"": 2}, {"": 1})
    assert found["hako_ended_dropped_total"] == {"kind=events": 3}


@pytest.mark.parametrize(
    "entry",
    [{}, {"kind": "start"}, {"kind": "start", "how": "cold", "took_s": "x"}, {"kind": "end", "dropped": 1}],
)
def test_a_malformed_entry_is_left_out(entry: dict[str, Any]) -> None:
    assert samples(journal=(entry,)).get("hako_template_hits_total") == {"": 0}


@pytest.mark.parametrize(
    "text",
    [
        "no format at all {",
        'kata_guest_load{sandbox_id="other"} 1\n',
        "hako_sandbox_up 0\n",
        "kata_shim_threads 9\n",
        "kata_guest_load nan\n",
        'kata_guest_load{item="%s"} 1\n' % ("x" * 1000),
    ],
)
def test_a_guest_can_neither_lie_about_others_nor_break_a_scrape(text: str) -> None:
    found = samples(reply(guest=text))

    assert "kata_guest_load" not in found
    assert found["kata_shim_threads"] == {f"{POD},sandbox_id=one": 3}


def test_a_guest_cannot_make_two_families_of_one_name() -> None:
    found = samples(reply(guest='kata_guest_load{a="1"} 1\nkata_guest_load{b="1"} 2\n'))

    assert len(found["kata_guest_load"]) == 1


def test_the_dashboard_shows_only_metrics_and_labels_that_exist() -> None:
    failure = {"kind": "failure", "phase": "a", "cause": "b"}
    found = samples(reply(), journal=(START, {"kind": "container", "took_s": 0.4}, failure))
    known = OF_THE_SCRAPE | {
        name: {label.partition("=")[0] for labels in values for label in labels.split(",")}
        for name, values in found.items()
    }
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]

    assert len(queries) >= 10
    for query in queries:
        names = re.findall(r"\b(?:hako|kata)_\w+", query)
        labels = {each for by in re.findall(r"by \(([^)]*)\)", query) for each in by.split(", ")}
        assert names
        for name in names:
            assert labels <= known[name], query

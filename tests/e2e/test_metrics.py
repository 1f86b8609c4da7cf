"""Prometheus sees every sandbox of a node, what they use, and which one does not answer."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto.hako import management_pb2 as api
from shim import cli
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import _census, new_id
from tests.e2e.life import MOMENT_S, until
from tests.e2e.life import stopped as stopped_processes
from tests.e2e.test_management import ask
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

SCRAPE_S, PROMETHEUS_S = 2.0, patient(10.0)
"""How long a scrape may take, and how long Prometheus waits for it."""
_T = TypeVar("_T")
WINDOW_S, ATTEMPTS = 5.0, 5
PROCESSOR = "hako_container_cpu_seconds_total"
#: A quarter of a processor, all the time, and a part of the memory.
CPU_PERCENT, MEMORY_BYTES = 25, 60 << 20
LOAD = f"dd if=/dev/zero of=/dev/shm/x bs=1M count={MEMORY_BYTES >> 20}; while :; do :; done"
QUOTA = ["--cpu-period", "100000", "--cpu-quota", f"{CPU_PERCENT * 1000}"]


@contextlib.contextmanager
def monitor(stack: Stack) -> Iterator[str]:
    command = [sys.executable, "-m", "shim.cli", "monitor", "--json", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen([*command, "--config", stack.config], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        [(name, url)] = json.loads(process.stdout.readline()).items()
        assert name == "url"
        yield url
    finally:
        process.terminate()
        assert process.wait(timeout=MOMENT_S) == 0
        process.stdout.close()


def scrape(url: str) -> dict[str, dict[str, float]]:
    """Values by name, then by the labels that are asked about here."""
    with urllib.request.urlopen(url, timeout=PROMETHEUS_S) as answer:  # noqa: S310 - it is the monitor's
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            keys = ("sandbox_id", "process", "missing", "how", "phase", "action", "item")
            labels = " ".join(sample.labels[key] for key in keys if key in sample.labels)
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def scrape_of_all(url: str, sandboxes: set[str]) -> dict[str, dict[str, float]] | None:
    """What is scraped, if these shims and guests have answered: they have a second, even if they are busy."""
    found = scrape(url)
    missing = found.get("hako_sandbox_missing", {})
    have_answered = (
        found["hako_sandbox_up"][name] == 1 and f"{name} guest" not in missing for name in sandboxes
    )
    return found if all(have_answered) else None


def quick_scrape_of_all(url: str, sandboxes: set[str]) -> dict[str, dict[str, float]] | None:
    """As ``scrape_of_all``, if the answer came in time."""
    began_s = time.monotonic()
    found = scrape_of_all(url, sandboxes)
    return found if time.monotonic() - began_s < SCRAPE_S else None


def value_of(shown: str, name: str) -> int:
    """A number that containerd's Stats has; 0 if it is of the other version of cgroups."""
    match = re.search(rf"^{re.escape(name)}\s+(\d+)\s*$", shown, re.MULTILINE)
    return int(match[1]) if match else 0


def statistics(stack: Stack, container: str) -> tuple[float, int]:
    """The processor time in seconds and the bytes of memory of a container, as containerd's Stats says."""
    shown = stack.containerd.ctr("tasks", "metrics", container).stdout
    cpu_s = value_of(shown, "cpuacct.usage") / 1e9 + value_of(shown, "cpu.usage_usec") / 1e6
    return cpu_s, value_of(shown, "memory.usage_in_bytes") + value_of(shown, "memory.usage")


def timed(ask: Callable[[], _T]) -> tuple[float, _T]:
    """When something was asked, in the middle of question and answer, and the answer."""
    asked_s = time.monotonic()
    answer = ask()
    return (asked_s + time.monotonic()) / 2, answer


@dataclass(frozen=True, slots=True)
class Measured:
    """What three sources say of a load in about the same time: percent of a processor, and bytes.

    :param status: the exit status of top, which gives a shim up after some seconds.
    :param processor: of top, Stats and metrics.
    :param memory: of the same.
    :param top: all that top shows.
    :param scraped: all metrics.
    """

    status: int
    processor: tuple[float, float, float]
    memory: tuple[float, float, float]
    top: dict[str, float]
    scraped: dict[str, dict[str, float]]


def measure(stack: Stack, name: str, url: str, capsys: pytest.CaptureFixture[str]) -> Measured | None:
    """Measure a load; None if a source has no numbers."""
    first = timed(lambda: statistics(stack, name)), timed(lambda: scrape_of_all(url, {name}))
    status = cli.main(["top", "--json", "--interval", str(WINDOW_S), "--config", str(stack.config)])
    last = timed(lambda: statistics(stack, name)), timed(lambda: scrape_of_all(url, {name}))
    [top] = json.loads(capsys.readouterr().out)
    (began_s, before), (ended_s, (cpu_s, memory_bytes)) = first[0], last[0]
    (scrape_began_s, scraped_before), (scrape_ended_s, scraped) = first[1], last[1]
    if scraped_before is None or scraped is None:
        return None
    counted_s = scraped[PROCESSOR][name] - scraped_before[PROCESSOR][name]
    percent = (
        top["guest_cpu_percent"],
        100 * (cpu_s - before[0]) / (ended_s - began_s),
        100 * counted_s / (scrape_ended_s - scrape_began_s),
    )
    memory = (top["guest_memory_bytes"], memory_bytes, scraped["hako_container_memory_bytes"][name])
    return Measured(status, percent, memory, top, scraped)


@pytest.fixture(scope="module")
def busy(one_stack: Stack) -> Iterator[str]:
    """A container with a load that is known."""
    containerd, name = one_stack.containerd, new_id()
    with _census(one_stack):
        started = containerd.run(IMAGE, name, "sh", "-c", LOAD, options=["--detach", *QUOTA])
        try:
            assert started.code == 0, started.stderr
            until(lambda: statistics(one_stack, name)[1] > MEMORY_BYTES, what="the load")
            yield name
        finally:
            containerd.remove(name)


@pytest.mark.alone
def test_top_stats_and_metrics_agree_with_a_known_load(
    one_stack: Stack, busy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with monitor(one_stack) as url:
        for _ in range(ATTEMPTS):
            found = measure(one_stack, busy, url, capsys)
            if found is not None:
                break

    assert found is not None, "a guest does not answer"
    assert found.status == 0
    assert found.processor == pytest.approx((CPU_PERCENT,) * 3, rel=0.1)
    assert found.memory == pytest.approx((MEMORY_BYTES,) * 3, rel=0.1)
    assert found.top["cpu_percent"] > 0  # how much depends on the other work of the host
    of_qemu = found.scraped["hako_process_memory_bytes"][f"{busy} QEMU"]
    assert found.top["qemu_bytes"] > MEMORY_BYTES
    assert found.top["qemu_bytes"] == pytest.approx(of_qemu, rel=0.1)


def test_a_node_is_scraped_while_one_of_its_shims_is_stopped(one_stack: Stack, busy: str) -> None:
    containerd, stopped = one_stack.containerd, new_id()
    refused = containerd.run(IMAGE, new_id(), "true", options=["--rm", "--annotation", "io.hako.vcpus=0"])
    assert refused.code == 1
    with monitor(one_stack) as url:
        started = containerd.run(IMAGE, stopped, "sleep", "1000", options=["--detach"])
        try:
            assert started.code == 0, started.stderr
            found = until(partial(scrape_of_all, url, {busy, stopped}), what="both shims answer in time")
            assert found["kata_guest_meminfo"][f"{busy} memtotal"] > MEMORY_BYTES
            assert found["kata_virtiofsd_threads"][busy] > 0
            assert found["hako_failures_total"]["boot"] >= 1
            assert sum(found["hako_sandbox_start_seconds_count"].values()) >= 2
            assert f"{busy} Create" in found["kata_shim_rpc_durations_histogram_milliseconds_count"]
            assert found["hako_qmp_durations_histogram_milliseconds_count"][busy] > 0

            described = ask(
                one_stack.record(stopped), "Describe", api.DescribeRequest(), api.DescribeResponse
            )
            with stopped_processes(described.processes[0].pid):
                # If the stopped shim delayed a scrape, it would delay each.
                found = until(partial(quick_scrape_of_all, url, {busy}), what="a scrape is in time")
            assert found["hako_sandbox_up"][stopped] == 0
            assert found["hako_sandbox_missing"] == {f"{stopped} shim": 1}
            starts = found["hako_sandbox_start_seconds_count"]
        finally:
            containerd.remove(stopped)
        found = scrape(url)
        assert stopped not in found["hako_sandbox_up"]
        assert found["hako_sandbox_start_seconds_count"] == starts, "starts outlive their sandboxes"

"""Prometheus sees every sandbox of a node, what they use, and which one does not answer."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

SCRAPE_S = 2.0
#: Uses a processor, then keeps what it has in memory.
LOAD = "n=0; while [ $n -lt 60000 ]; do n=$((n+1)); done; "
LOAD += "dd if=/dev/zero of=/dev/shm/x bs=1M count=40; sleep 1000"


@contextlib.contextmanager
def monitor(stack: Stack) -> Iterator[str]:
    command = [sys.executable, "-m", "shim.cli", "monitor", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen([*command, "--config", stack.config], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0
        process.stdout.close()


def scrape(url: str) -> dict[str, dict[str, float]]:
    """Values by name, then by the labels that are asked about here."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - it is the monitor's
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            keys = ("sandbox_id", "process", "missing", "how", "phase", "action", "item")
            labels = " ".join(sample.labels[key] for key in keys if key in sample.labels)
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def value_of(shown: str, name: str) -> int:
    """A number that containerd's Stats has; 0 if it is of the other version of cgroups."""
    match = re.search(rf"^{re.escape(name)}\s+(\d+)\s*$", shown, re.MULTILINE)
    return int(match[1]) if match else 0


def shim_of(container: str) -> int:
    """The process that serves a container, as its command line says."""
    state = f"{container}".encode()
    [shim] = [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"-state\0" in (line := path.read_bytes()) and state in line.split(b"\0")
    ]
    return int(shim.parent.name)


def test_a_node_is_scraped_while_one_of_its_shims_is_stopped(one_stack: Stack) -> None:
    containerd = one_stack.containerd
    busy, stopped = new_id(), new_id()
    refused = containerd.run(IMAGE, new_id(), "true", options=["--rm", "--annotation", "io.hako.vcpus=0"])
    assert refused.code == 1
    try:
        for name in (busy, stopped):
            started = containerd.run(IMAGE, name, "sh", "-c", LOAD, options=["--detach"])
            assert started.code == 0, started.stderr
        wait = ["sh", "-c", "while ! [ -s /dev/shm/x ] || pidof dd; do sleep 0.2; done"]
        assert containerd.ctr("tasks", "exec", "--exec-id", new_id(), busy, *wait).code == 0
        with monitor(one_stack) as url:
            found = scrape(url)
            shown = containerd.ctr("tasks", "metrics", busy).stdout
            assert found["hako_sandbox_up"][busy] == found["hako_sandbox_up"][stopped] == 1
            cpu_s = value_of(shown, "cpuacct.usage") / 1e9 + value_of(shown, "cpu.usage_usec") / 1e6
            usage = value_of(shown, "memory.usage_in_bytes") + value_of(shown, "memory.usage")
            assert found["hako_container_cpu_seconds_total"][busy] == pytest.approx(cpu_s, rel=0.1)
            assert found["hako_container_memory_bytes"][busy] == pytest.approx(usage, rel=0.1)
            assert found["hako_process_memory_bytes"][f"{busy} QEMU"] > usage
            assert found["kata_guest_meminfo"][f"{busy} memtotal"] > 40 << 20
            assert found["hako_failures_total"]["boot"] >= 1
            assert sum(found["hako_sandbox_start_seconds_count"].values()) >= 2
            assert f"{busy} Create" in found["kata_shim_rpc_durations_histogram_milliseconds_count"]
            assert found["hako_qmp_durations_histogram_milliseconds_count"][busy] > 0

            pid = shim_of(stopped)
            os.kill(pid, signal.SIGSTOP)
            try:
                began_s = time.monotonic()
                found = scrape(url)
                took_s = time.monotonic() - began_s
            finally:
                os.kill(pid, signal.SIGCONT)
            assert took_s < SCRAPE_S
            assert (found["hako_sandbox_up"][busy], found["hako_sandbox_up"][stopped]) == (1, 0)
            assert found["hako_sandbox_missing"] == {f"{stopped} shim": 1}
            starts = found["hako_sandbox_start_seconds_count"]
            containerd.remove(busy)
            found = scrape(url)
            assert busy not in found["hako_sandbox_up"]
            assert found["hako_sandbox_start_seconds_count"] == starts, "starts outlive their sandboxes"
    finally:
        for name in (busy, stopped):
            if name in containerd.containers():
                containerd.remove(name)

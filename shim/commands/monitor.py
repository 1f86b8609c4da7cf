"""``hako monitor``: Prometheus' metrics of this node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from hypervisor import printable
from proto.hako.metrics_pb2 import ReadRequest, ReadResponse
from shim.commands import shims
from shim.commands.exposition import History, sandbox_metrics
from shim.host import process_usage
from shim.override import override
from shim.refusal import Refusal
from shim.telemetry.journal import Journal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import Any

    from prometheus_client.metrics_core import Metric

    from shim.config import ShimConfig
    from shim.host.state_directory import StartRecord

_LISTEN = "127.0.0.1:8090"
SERVICE = "hako.metrics.v1.Metrics"
SHIM_TIMEOUT_S = 1.2
"""A stopped shim must not delay a scrape, which may take 2 s."""
GUEST_TIMEOUT_S = 0.8
_LONGEST_PROBLEM = 200


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("monitor", help="serve the metrics of this host to Prometheus")
    parser.add_argument(
        "--listen", default=_LISTEN, metavar="ADDRESS:PORT", help=f"where to serve them ({_LISTEN})"
    )
    parser.add_argument("--json", action="store_true", help="print the address as JSON")
    shims.add_config_to(parser)


def run(chosen: argparse.Namespace) -> int:
    """Serve the metrics until a signal arrives.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if the configuration or the address cannot be used.
    """
    return _serve(shims.settings_of(chosen).shim, chosen.listen, as_json=chosen.json)


def _serve(settings: ShimConfig, listen: str, *, as_json: bool) -> int:
    address, _, port = listen.rpartition(":")
    if not (address and port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise Refusal(f"monitor: {listen!r} is not an address and port; give for example 127.0.0.1:8090")
    registry = CollectorRegistry()
    collector = NodeCollector(settings, scrapes=registry)
    collector.read_journal()  # so that no scrape waits for it
    registry.register(collector)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    try:
        server, thread = start_http_server(int(port), address.strip("[]"), registry)
    except OSError as error:
        raise Refusal(f"monitor: {listen}: {error.strerror}; choose another with --listen") from error
    url = f"http://{address}:{server.server_port}/metrics"
    print(json.dumps({"url": url}) if as_json else f"monitor: {url}", flush=True)
    over.wait()
    server.shutdown()
    server.server_close()
    thread.join()
    return 0


class NodeCollector(Collector):
    """Asks every sandbox of the node when it is scraped, all at once.

    :param settings: where sandboxes keep their state and their journal.
    :param only: the one sandbox to ask; None for all.
    :param scrapes: where the monitor registers its own metrics; None for none.
    """

    def __init__(
        self,
        settings: ShimConfig,
        *,
        only: StartRecord | None = None,
        scrapes: CollectorRegistry | None = None,
    ) -> None:
        self._state_dir = settings.state_dir
        self._journal = Journal(Path(settings.log_dir))
        self._history = History()
        self._only = only
        self._counts = {"kata_monitor_scrape": 0, "kata_monitor_scrape_failed": 0}
        self._lock = threading.Lock()
        self._durations = scrapes and Histogram(
            "kata_monitor_scrape_durations_histogram_milliseconds",
            "How long scrapes take.",
            buckets=[float(1 << power) for power in range(13)],
            registry=scrapes,
        )

    def describe(self) -> list[Metric]:
        """Describe no metrics in advance, because that would itself be a scrape."""
        return []

    @override
    def collect(self) -> Iterator[Metric]:
        """Ask the sandboxes and yield the metrics."""
        began_s = time.monotonic()
        answers = shims.still_there(asyncio.run(shims.ask_all(self.records(), _ask)))
        with self._lock:  # two scrapes may run at once
            self._counts["kata_monitor_scrape"] += 1
            self._counts["kata_monitor_scrape_failed"] += sum(not answer.value for answer in answers)
            self.read_journal()
            yield from _of_scrape(answers)
            replies = [answer.value for answer in answers if answer.value is not None]
            numbers = {}
            for process in (process for reply in replies for process in reply.processes):
                with contextlib.suppress(OSError, KeyError, ValueError):  # it has just ended
                    numbers[process.pid] = process_usage.measure_in_detail(process.pid)
            yield from sandbox_metrics(replies, numbers)
            if self._only:
                return
            yield from self._history.metrics()
            for name, count in self._counts.items():
                yield CounterMetricFamily(name, "Scrapes, and sandboxes that were missing in one.", count)
        if self._durations:
            self._durations.observe((time.monotonic() - began_s) * 1000)

    @property
    def has_missed_one(self) -> bool:
        """Whether a shim has not answered in a scrape."""
        return self._counts["kata_monitor_scrape_failed"] > 0

    def read_journal(self) -> None:
        """Count what is new in the journal; the first time, that may be thousands of entries."""
        for entry in self._journal.read():
            self._history.add(entry)

    def records(self) -> list[StartRecord]:
        """List the sandboxes to ask."""
        return [self._only] if self._only else shims.records(self._state_dir)


def _of_scrape(answers: list[shims.Answer[ReadResponse]]) -> Iterator[Metric]:
    labels = ["sandbox_id", "namespace"]
    answered = GaugeMetricFamily("hako_sandbox_up", "Whether the shim has answered.", labels=labels)
    missing = GaugeMetricFamily(
        "hako_sandbox_missing", "A sandbox without numbers, and why.", labels=[*labels, "missing", "reason"]
    )
    states: dict[str, int] = {}
    for answer in answers:
        of = [answer.record.id, answer.record.namespace]
        answered.add_metric(of, int(answer.value is not None))
        if answer.value is None:
            missing.add_metric([*of, "shim", answer.problem], 1)
            continue
        states[answer.value.state] = states.get(answer.value.state, 0) + 1
        if answer.value.problem:
            missing.add_metric([*of, "guest", printable(answer.value.problem, limit=_LONGEST_PROBLEM)], 1)
    sandboxes = GaugeMetricFamily("hako_sandboxes", "Sandboxes that answer, by state.", labels=["state"])
    for state, count in sorted(states.items()):
        sandboxes.add_metric([state], count)
    running = sum(answer.value is not None for answer in answers)
    yield GaugeMetricFamily("kata_monitor_running_shim_count", "Shims that answer.", running)
    yield from (answered, missing, sandboxes)


async def _ask(record: StartRecord) -> ReadResponse:
    request = ReadRequest(guest_timeout_s=GUEST_TIMEOUT_S)
    return await shims.ask(record, "Read", request, ReadResponse, timeout_s=SHIM_TIMEOUT_S, service=SERVICE)

"""The two ends of the network whose speed the benchmarks measure."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from scripts.benchmarks import load
from scripts.benchmarks.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.network_space import Space

MIB = 1 << 20


@pytest.fixture
def worker(outside: Space) -> Iterator[Worker]:
    """A load program, beside another one that is its other end."""
    command = ["nsenter", f"--net={outside.path}", sys.executable, "-ISB", load.__file__]
    with Worker("server", [*command, load.SERVE]), Worker("load", command) as running:
        yield running


def test_both_ends_agree_on_what_travels(worker: Worker) -> None:
    assert worker.ask("tcp_out", "127.0.0.1", MIB) > 0
    assert worker.ask("tcp_in", "127.0.0.1", MIB) > 0
    assert worker.ask("tcp_trips", "127.0.0.1", 5) > 0
    assert worker.ask("udp_out", "127.0.0.1", 64) > 0
    assert worker.ask("udp_in", "127.0.0.1", 64) > 0
    assert worker.ask("udp_trips", "127.0.0.1", 5) > 0

"""What asks all shims of a node names the one that is stopped, and does not wait for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.shim.light_shims import NAMESPACE, name_of
from tests.patience import patient
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.alone

TREE = Path(__file__).parents[3]
COUNT, STOPPED = 20, 7
SCRAPE_S, PROMETHEUS_S = 2.0, patient(10.0)
"""How long a scrape may take, and how long Prometheus waits for it."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its own directories."""
    place = tmp_path_factory.mktemp("shims")
    file = place / "config.toml"
    file.write_text(f'[shim]\nstate_dir = "{place}/state"\nlog_dir = "{place}/log"\n', encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def shims(config: Path) -> Iterator[list[int]]:
    """Many shims, one of them stopped; the processes."""
    state = config.parent / "state"
    state.mkdir()
    argv = [sys.executable, "-m", "tests.integration.shim.light_shims", str(state), str(COUNT)]
    with subprocess.Popen(
        argv, cwd=TREE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:
        assert nursery.stdout is not None
        pids = [int(word) for word in nursery.stdout.readline().split()]
        os.kill(pids[STOPPED], signal.SIGSTOP)
        yield pids
        nursery.communicate(timeout=WITHIN_S)
    assert nursery.returncode == 0


@pytest.fixture
def monitor(config: Path) -> Iterator[str]:
    """The address of a node's monitor."""
    argv = [sys.executable, "-m", "shim.cli", "monitor", "--listen", "127.0.0.1:0", "--config", str(config)]
    with subprocess.Popen(argv, cwd=TREE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def stopped(shims: list[int]) -> str:
    """What is said of the stopped one."""
    return f"its shim is stopped; `kill -CONT {shims[STOPPED]}` lets it go on"


def test_a_scrape_of_twenty_sandboxes_ends_in_time_and_names_the_missing_one(
    shims: list[int], monitor: str
) -> None:
    began_s = time.monotonic()
    with urllib.request.urlopen(monitor, timeout=PROMETHEUS_S) as answer:  # noqa: S310 - it is the monitor's
        text = answer.read().decode()
    took_s = time.monotonic() - began_s

    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    up = {sample.labels["sandbox_id"]: sample.value for sample in families["hako_sandbox_up"]}
    assert up == {name_of(number): float(number != STOPPED) for number in range(COUNT)}
    [missing] = families["hako_sandbox_missing"]
    assert (missing.labels["sandbox_id"], missing.labels["missing"]) == (name_of(STOPPED), "shim")
    assert missing.labels["reason"] == stopped(shims)
    assert len(shims) == COUNT
    assert took_s < SCRAPE_S


def test_ps_of_twenty_sandboxes_names_the_missing_one(shims: list[int], config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shim.cli", "ps", "--json", "--config", str(config)],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=False,
    )

    found = json.loads(done.stdout)
    assert (done.returncode, len(found)) == (1, len(shims))
    assert {each["namespace"] for each in found} == {NAMESPACE}
    problems = {each["id"]: each["problem"] for each in found if each["problem"]}
    assert problems == {name_of(STOPPED): stopped(shims)}

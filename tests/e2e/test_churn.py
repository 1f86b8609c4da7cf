"""Containers come and go by the hundred, and neither the machine nor a long-lived shim grows."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.life import MOMENT_S, Life, until
from tests.e2e.test_refusals import configured

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.mostly_on("1.7-ttrpc")]

NIGHTLY = pytest.mark.nightly
GROWTH_BYTES = 1 << 20
WARM_UP = 20


def run_one(stack: Stack, number: int) -> tuple[int, str]:
    """Run a container that says its number; return its exit code and output."""
    result = stack.containerd.run(
        IMAGE, new_id(), "sh", "-c", f"echo {number}; exit {number % 7}", timeout_s=400
    )
    return result.code, result.stdout + result.stderr


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [5, pytest.param(200, marks=NIGHTLY)])
def test_containers_one_after_the_other_leave_nothing(stack: Stack, count: int) -> None:
    outcomes = [run_one(stack, number) for number in range(count)]

    assert outcomes == [(number % 7, f"{number}\n") for number in range(count)]


@pytest.mark.nightly  # by day ten at once are those of test_together.py
@pytest.mark.alone
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", ["booted", "cloned"])
def test_containers_beside_each_other_leave_nothing(stack: Stack, start: str) -> None:
    patient = configured(stack, guest="boot_timeout_s = 300")  # ten boots share the machine's processors
    with patient if start == "booted" else nullcontext(), ThreadPoolExecutor(10) as pool:
        outcomes = enumerate(pool.map(lambda number: run_one(stack, number), range(100)))
        wrong = [each for each in outcomes if each != (each[0], (each[0] % 7, f"{each[0]}\n"))]

    assert wrong == []


@pytest.mark.timeout(600)
@pytest.mark.nightly
@pytest.mark.parametrize("count", [40, 400])
def test_many_execs_leave_a_shim_as_it_was(stack: Stack, home: Path, count: int) -> None:
    with Life(stack, home) as life:
        life.write_down()
        life.tasks.begin_create(life.id).result()
        life.tasks.call("Start", life.id)

        def run_execs(upto: int) -> None:
            for number in range(upto):
                life.tasks.add_exec(life.id, f"extra-{number}", "true")
                life.tasks.call("Start", life.id, exec_id=f"extra-{number}")
                assert life.tasks.call("Wait", life.id, exec_id=f"extra-{number}").exit_status == 0
                life.tasks.call("DeleteProcess", life.id, exec_id=f"extra-{number}")

        run_execs(WARM_UP)
        before = measure(life.pid("shim"))
        run_execs(count)
        until(lambda: measure(life.pid("shim"))[0] == before[0], what="no more file descriptors than before")
        after = measure(life.pid("shim"))

        assert after[1] - before[1] < GROWTH_BYTES, "resident memory"
        life.tasks.call("Kill", life.id, signal=9)
        life.wait_for_state({"STOPPED"}, timeout_s=MOMENT_S)
        life.remove()


def measure(pid: int) -> tuple[int, int]:
    """Return a process's number of file descriptors and its resident memory in bytes."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text(encoding="utf-8").split()[1])
    return len(list((process / "fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")

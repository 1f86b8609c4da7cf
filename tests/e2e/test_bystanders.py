"""The zygote may die at any moment: no container notices."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.life import Life, until
from tests.e2e.nursery import ZYGOTE, processes
from tests.e2e.tasks import outcomes
from tests.e2e.test_kill_matrix import CALLS_END_S, CONSISTENT_S, PHASES, bring_to
from tests.e2e.test_refusals import configured

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Stack
    from tests.e2e.nursery import Process

pytestmark = pytest.mark.hako

STATES = {
    **dict.fromkeys(("during start", "during create", "created"), "CREATED"),
    **dict.fromkeys(("running", "during exec"), "RUNNING"),
    "paused": "PAUSED",
    "stopping": "STOPPED",
    "during delete": "GONE",
}
BY_DAY = ("during start", "running")


def zygotes_of(stack: Stack) -> list[Process]:
    """Return the process that forks shims, or is about to, if there is one."""
    return list(stack.containerd.nursery.zygotes(stack.containerd.address))


@pytest.fixture
def with_zygote(one_stack: Stack) -> None:
    """See that there is a zygote that serves."""
    # One that the test before has killed, and that is not quite gone, would keep another from coming up.
    until(lambda: not zygotes_of(one_stack) or forks_of(one_stack), what="the zygote serves or is gone")
    first = one_stack.containerd.run(IMAGE, new_id(), "true")
    assert first.code == 0, first.stderr
    until(lambda: forks_of(one_stack), what="the zygote serves")


@pytest.mark.parametrize(
    "phase",
    [pytest.param(each, marks=() if each in BY_DAY else pytest.mark.nightly) for each in PHASES],
)
def test_the_death_of_the_zygote_hurts_no_shim(
    one_stack: Stack, with_zygote: None, home: Path, phase: str
) -> None:
    with Life(one_stack, home) as life:
        life.write_down()
        under_way = bring_to(life, phase)
        [zygote] = zygotes_of(one_stack)
        os.kill(zygote.pid, signal.SIGKILL)

        assert set(outcomes(under_way, timeout_s=CALLS_END_S)) <= {grpc.StatusCode.OK}
        state, _ = life.wait_for_state({STATES[phase]}, timeout_s=CONSISTENT_S)
        if state not in {"STOPPED", "GONE"}:
            life.tasks.call("Kill", life.id, signal=signal.SIGKILL)
        assert life.exits.wait_for(life.id, timeout_s=CONSISTENT_S)
        next_one = one_stack.containerd.run(IMAGE, new_id(), "echo", "started anew")
        assert (next_one.code, next_one.stdout) == (0, "started anew\n"), next_one.stderr
        life.remove()
        assert life.exits.of(life.id) == [128 + signal.SIGKILL]


@pytest.mark.parametrize(
    "delay_s",
    [0.01, *(pytest.param(each, marks=pytest.mark.nightly) for each in (0, 0.005, 0.02, 0.04, 0.08))],
)
def test_the_death_of_the_process_that_starts_leaves_nothing(
    one_stack: Stack, with_zygote: None, home: Path, delay_s: float
) -> None:
    with Life(one_stack, home) as life:
        life.write_down()
        spare = spare_of(one_stack)
        creating = life.tasks.begin_create(life.id)
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(spare.pid, signal.SIGKILL)

        # It may have been the shim already: then the task is not, or not for long.
        list(outcomes([creating], timeout_s=CALLS_END_S))
        life.wait_for_state({"CREATED", "GONE"}, timeout_s=CONSISTENT_S)
        life.remove()
        assert set(life.exits.of(life.id)) <= {128 + signal.SIGKILL}
        again = one_stack.containerd.run(IMAGE, life.id, "echo", "again")
        assert (again.code, again.stdout) == (0, "again\n"), again.stderr


@pytest.mark.parametrize(
    "delay_s", [0.1, *(pytest.param(each, marks=pytest.mark.nightly) for each in (0, 0.05, 0.2, 0.4))]
)
def test_the_death_of_the_process_that_deletes_leaves_nothing(
    one_stack: Stack, with_zygote: None, home: Path, delay_s: float
) -> None:
    with Life(one_stack, home) as life:
        life.write_down()
        life.tasks.begin_create(life.id).result()
        life.tasks.call("Start", life.id)
        life.tasks.call("Kill", life.id, signal=signal.SIGKILL)
        life.wait_for_state({"STOPPED"}, timeout_s=CONSISTENT_S)
        spare = spare_of(one_stack)
        deleting = life.tasks.begin("Delete", life.id)
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(spare.pid, signal.SIGKILL)

        assert list(outcomes([deleting], timeout_s=CALLS_END_S)) == [grpc.StatusCode.OK]
        assert life.exits.wait_for(life.id, timeout_s=CONSISTENT_S)
        life.remove()
        assert life.exits.of(life.id) == [128 + signal.SIGKILL]


def spare_of(stack: Stack) -> Process:
    """Return the fork that the zygote keeps for the next request."""
    found: list[Process] = until(lambda: forks_of(stack), what="the zygote has a spare")
    return found[-1]


def forks_of(stack: Stack) -> list[Process]:
    """Return the zygote's forks that have not become shims, the youngest last."""
    zygotes = {zygote.pid for zygote in zygotes_of(stack)}
    forks = (each for each in processes().values() if each.parent in zygotes and each.state != "Z")
    return sorted((each for each in forks if ZYGOTE in each.command), key=lambda fork: fork.start_time)


def test_a_container_lives_without_a_zygote(one_stack: Stack) -> None:
    with configured(one_stack, shim="zygote = false"):
        result = one_stack.containerd.run(IMAGE, new_id(), "sh", "-c", "echo alone; exit 3")
    assert (result.code, result.stdout) == (3, "alone\n"), result.stderr

"""A guest's clock is compared with the host's from time to time, and set if it is certainly wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, cast

import pytest

from shim.agent.gate import Gate
from shim.errors import DeadlineExceeded, Unavailable
from shim.machine import clock
from shim.machine.clock import Reading, correction, reading, together
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

    from shim.agent import client


MS = 1_000_000


def test_a_guest_is_assumed_to_read_its_clock_in_the_middle_of_the_call() -> None:
    assert reading("107000000", asked_at_ns=100 * MS, answered_at_ns=104 * MS) == Reading(5 * MS, 2 * MS)


def test_a_guest_that_reads_the_hosts_clock_is_believed() -> None:
    assert reading("1 -3000", asked_at_ns=0, answered_at_ns=10**9) == Reading(-3000, 0)


@pytest.mark.parametrize("answer", ["", "soon", "1 x", "9" * 5000])
def test_a_malformed_answer_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        reading(answer, asked_at_ns=0, answered_at_ns=0)


@pytest.mark.parametrize(
    ("found", "shift"),
    [
        (Reading(-300 * MS, 40 * MS), 300 * MS),
        (Reading(MS // 2, MS // 10), 0),
        (Reading(9 * MS, 20 * MS), 0),
    ],
)
def test_the_clock_is_set_if_it_is_certainly_wrong(found: Reading, shift: int) -> None:
    assert correction(found) == shift


@pytest.mark.parametrize(
    ("readings", "found"),
    [
        ([Reading(9 * MS, 20 * MS), Reading(5 * MS, MS)], Reading(5 * MS, MS)),
        ([Reading(10 * MS, 4 * MS), Reading(2 * MS, 6 * MS)], Reading(7 * MS, MS)),
        ([Reading(10 * MS, 4 * MS), Reading(2 * MS, MS)], Reading(2 * MS, MS)),
    ],
)
def test_several_readings_reduce_the_uncertainty(readings: list[Reading], found: Reading) -> None:
    assert together(readings) == found


class Agent:
    """An agent whose clock is behind by some milliseconds."""

    def __init__(self, *, behind_ms: float, tells_time: bool = True) -> None:
        self.tells_time = tells_time
        self.behind_ns = int(behind_ms * MS)
        self.asked = asyncio.Event()
        self.refusal: Exception | None = None
        self.set = 0
        self.gate = Gate()

    async def ask_time(self) -> str:
        self.asked.set()
        if self.refusal is not None:
            raise self.refusal
        return f"{time.time_ns() - self.behind_ns} {-self.behind_ns}"

    async def move_time(self, shift_ns: int) -> None:
        self.behind_ns -= shift_ns

    async def set_time(self) -> None:
        self.set += 1
        self.asked.set()


async def wait_until_asked(agent: Agent) -> None:
    async with asyncio.timeout(WITHIN_S):
        await agent.asked.wait()
        agent.asked.clear()


@pytest.fixture
async def child() -> AsyncIterator[Process]:
    """A child process that sleeps."""
    process = await asyncio.create_subprocess_exec("sleep", "100")
    yield process
    process.kill()
    await process.wait()


async def keeping(agent: Agent, pid: int) -> asyncio.Task[None]:
    right = asyncio.Event()
    task = asyncio.create_task(clock.keep(cast("client.Agent", agent), pid=pid, right=right))
    await asyncio.wait_for(right.wait(), WITHIN_S)
    return task


@pytest.mark.parametrize("tells_time", [True, False])
async def test_a_clock_is_corrected_at_once_and_after_qemu_was_stopped(
    child: Process, tells_time: bool
) -> None:
    agent = Agent(behind_ms=300, tells_time=tells_time)
    task = await keeping(agent, child.pid)
    await wait_until_asked(agent)
    assert (agent.behind_ns, agent.set) == ((0, 0) if tells_time else (300 * MS, 1))
    os.kill(child.pid, signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WSTOPPED)
    os.kill(child.pid, signal.SIGCONT)
    await wait_until_asked(agent)
    task.cancel()


async def test_a_clock_is_compared_again_even_if_the_guest_was_too_busy(
    child: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "SOON_S", 0.01)
    monkeypatch.setattr(clock, "INTERVAL_S", 0.01)
    agent = Agent(behind_ms=300)
    agent.refusal = DeadlineExceeded("late")
    task = await keeping(agent, child.pid)
    await wait_until_asked(agent)
    agent.refusal = None
    await wait_until_asked(agent)
    await wait_until_asked(agent)
    assert agent.behind_ns == 0
    task.cancel()


async def test_a_guest_that_is_gone_is_left_alone(child: Process) -> None:
    agent = Agent(behind_ms=300)
    agent.refusal = Unavailable("gone")
    await (await keeping(agent, child.pid))

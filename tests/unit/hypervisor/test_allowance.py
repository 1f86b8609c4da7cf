"""A guest may cause a lot of work now and then, and a little at any time."""

from __future__ import annotations

import asyncio

from hypervisor.allowance import Allowance


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_whole_burst_may_be_used_at_once() -> None:
    allowance = Allowance(burst=3, per_s=1, clock=Clock())
    assert [allowance.take() for _ in range(4)] == [True, True, True, False]


def test_the_allowance_refills_with_time_up_to_the_burst() -> None:
    clock = Clock()
    allowance = Allowance(burst=3, per_s=2, clock=clock)
    assert allowance.take(3)
    clock.now_s += 1
    assert (allowance.take(2), allowance.take()) == (True, False)
    clock.now_s += 1000
    assert (allowance.take(3), allowance.take()) == (True, False)


def test_a_refusal_uses_nothing_up() -> None:
    allowance = Allowance(burst=3, per_s=0, clock=Clock())
    assert not allowance.take(4)
    assert allowance.take(3)


async def test_waiting_ends_when_the_allowance_suffices() -> None:
    allowance = Allowance(burst=1, per_s=1000)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for _ in range(21):
        await allowance.wait()
    assert loop.time() - began_s >= 0.019

"""A gate keeps callers from a guest whose machine is parked, or has them wake it."""

from __future__ import annotations

import asyncio

import pytest

from shim.agent.gate import Gate
from shim.errors import Unavailable
from tests.waiting import WITHIN_S, settle


class Machine:
    """A machine behind a gate, which it opens when it wakes."""

    def __init__(self, *, wakes: bool = True) -> None:
        self.gate = Gate()
        self.gate.wake = self.wake
        self.woken = 0
        self._wakes = wakes

    async def wake(self) -> None:
        self.woken += 1
        if not self._wakes:
            raise Unavailable("its memory is lost")
        self.gate.open()

    async def park(self) -> None:
        self.gate.hold()
        await self.gate.close()


async def test_an_open_gate_wakes_nobody() -> None:
    machine = Machine()

    with await machine.gate.asking():
        pass
    await machine.gate.free()

    assert machine.woken == 0


async def test_a_question_wakes_the_machine() -> None:
    machine = Machine()
    await machine.park()

    with await machine.gate.asking():
        assert machine.woken == 1


async def test_a_question_fails_if_the_machine_does_not_wake() -> None:
    machine = Machine(wakes=False)
    await machine.park()

    with pytest.raises(Unavailable, match="lost"):
        await machine.gate.asking()


async def test_a_gate_closes_only_after_the_last_answer() -> None:
    machine = Machine()
    with await machine.gate.asking():
        closing = asyncio.create_task(machine.park())
        await settle()
        with await machine.gate.asking():
            assert machine.woken == 0, "a gate that is held lets questions pass"
        assert not closing.done()

    async with asyncio.timeout(WITHIN_S):
        await closing


async def test_those_who_wait_are_let_in_once_the_machine_is_awake() -> None:
    machine = Machine()
    await machine.park()
    waiting = [asyncio.create_task(machine.gate.free()), asyncio.create_task(machine.gate.waiting())]
    await settle()
    assert machine.woken == 0
    assert not any(task.done() for task in waiting)

    machine.gate.admit()
    await settle()
    assert not any(task.done() for task in waiting), "questions only"
    machine.gate.open()

    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(*waiting)

"""Turns: a limited number of processes work at once, and a dead one keeps no turn."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

from shim.machine import turns
from tests.descriptors import descriptors
from tests.waiting import WITHIN_S, reached, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

AT_ONCE = 2
HOLDER = """
import asyncio, pathlib, sys
from shim.machine import turns

async def hold() -> None:
    async with turns.turn(pathlib.Path(sys.argv[1]), at_once=1, given_up=asyncio.Event()):
        print("held", flush=True)
        await asyncio.Event().wait()

asyncio.run(hold())
"""


class Crowd:
    """Counts processes with a turn: now, and at most at once."""

    def __init__(self, directory: Path, *, at_once: int) -> None:
        self.given_up = asyncio.Event()
        self.leave = asyncio.Event()
        self.began = asyncio.Event()
        self.present = 0
        self.most = 0
        self._directory = directory
        self._at_once = at_once

    async def visit(self) -> None:
        async with turns.turn(self._directory, at_once=self._at_once, given_up=self.given_up):
            self.present += 1
            self.most = max(self.most, self.present)
            self.began.set()
            await self.leave.wait()
            self.present -= 1

    @contextlib.asynccontextmanager
    async def visitors(self, count: int) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(self.visit())
            yield
            self.leave.set()


async def test_no_more_work_at_once_than_there_are_turns(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "turns", at_once=AT_ONCE)
    async with asyncio.timeout(WITHIN_S), crowd.visitors(10):
        await reached(lambda: crowd.present == AT_ONCE)
        await settle()
        assert crowd.present == AT_ONCE
    assert (crowd.present, crowd.most) == (0, AT_ONCE)


async def test_the_turn_of_a_killed_process_goes_to_the_next(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    crowd = Crowd(tmp_path, at_once=1)
    async with asyncio.timeout(WITHIN_S), crowd.visitors(1):
        await settle()
        waited = crowd.present == 0
        holder.kill()
        await crowd.began.wait()
    assert waited
    await holder.wait()


async def test_giving_up_ends_the_wait_immediately(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, at_once=1)
    async with asyncio.timeout(WITHIN_S), crowd.visitors(2):
        await reached(lambda: crowd.present == 1)
        await settle()
        crowd.given_up.set()
        await reached(lambda: crowd.present == 2)


async def test_a_turn_ends_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LONGEST_S", 0.01)
    crowd = Crowd(tmp_path, at_once=1)
    async with asyncio.timeout(WITHIN_S), crowd.visitors(2):
        await reached(lambda: crowd.present == 2)


async def test_a_wait_ends_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_PATIENCE_S", 0.01)
    crowd = Crowd(tmp_path, at_once=1)
    async with asyncio.timeout(WITHIN_S), crowd.visitors(2):
        await reached(lambda: crowd.present == 2)


async def test_a_cancelled_wait_leaves_no_descriptor_open(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, at_once=1)
    async with asyncio.timeout(WITHIN_S), crowd.visitors(1):
        await reached(lambda: crowd.present == 1)
        before = descriptors()
        waiting = asyncio.create_task(crowd.visit())
        await reached(lambda: not descriptors() <= before)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert descriptors() <= before


async def test_without_a_directory_machines_start_without_turns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    crowd = Crowd(tmp_path / "file", at_once=1)
    async with asyncio.timeout(WITHIN_S), crowd.visitors(2):
        await reached(lambda: crowd.present == 2)
    assert "starts without one" in caplog.text

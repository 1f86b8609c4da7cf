"""A machine is parked only if nothing is asked of its guest, and goes on if that fails."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from hypervisor.errors import ParkedMemoryLostError, ParkError
from shim.agent.gate import Gate
from shim.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted, Unavailable
from shim.machine import parking
from shim.machine.parking import Parking
from shim.machine.rest import Rest

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor import Hypervisor
    from shim.agent.client import Agent

MEMORY_BYTES = 50 << 20


class Vm:
    """A machine that is parked, or refuses."""

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.is_parked = False

    async def park(self, file: int) -> int:
        os.fstat(file)
        if self.refusal is not None:
            raise self.refusal
        self.is_parked = True
        return MEMORY_BYTES

    async def unpark(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.is_parked = False


class Rested:
    """The parking of a machine whose guest answers everything."""

    def __init__(self, directory: Path) -> None:
        self.gate = Gate()
        self.vm = Vm()
        self.moves: list[str] = []
        self.switched_off = ""
        agent = SimpleNamespace(
            gate=self.gate, is_hako=True, tells_time=False, set_time=self._set_time, drop_caches=self._drop
        )
        self.parking = Parking(
            cast("Hypervisor", self.vm),
            cast("Agent", agent),
            directory=str(directory / "parked"),
            switch_off=self._switch_off,
        )

    async def _drop(self) -> None:
        self.moves.append("drop")
        raise DeadlineExceeded("a busy guest")

    async def _set_time(self) -> None:
        self.moves.append("clock")
        assert not self.vm.is_parked

    async def _switch_off(self, reason: str) -> None:
        self.switched_off = reason


@pytest.fixture
def rested(tmp_path: Path) -> Rested:
    return Rested(tmp_path)


async def test_a_parked_machine_wakes_with_the_right_time(rested: Rested) -> None:
    assert await rested.parking.park() is not None
    assert (rested.parking.rest, rested.parking.memory_bytes) == (Rest.PARKED, MEMORY_BYTES)

    assert await rested.parking.wake() is not None

    assert (rested.parking.rest, rested.parking.memory_bytes) == (Rest.AWAKE, 0)
    assert rested.moves == ["drop", "clock"]
    await rested.gate.free()


async def test_parking_and_waking_twice_change_nothing(rested: Rested) -> None:
    await rested.parking.park()
    assert await rested.parking.park() is None
    await rested.parking.wake()
    assert await rested.parking.wake() is None


async def test_a_machine_that_cannot_be_parked_goes_on(rested: Rested) -> None:
    rested.vm.refusal = ParkError("park: No space left on device")

    with pytest.raises(FailedPrecondition, match=r"goes on in memory: .*No space left"):
        await rested.parking.park()

    assert rested.parking.rest is Rest.AWAKE
    await rested.gate.free()


async def test_a_request_that_is_not_answered_prevents_parking(
    rested: Rested, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "QUIET_TIMEOUT_S", 0.0)

    with await rested.gate.asking(), pytest.raises(FailedPrecondition, match="not answered"):
        await rested.parking.park()

    assert not rested.vm.is_parked


async def test_a_directory_that_cannot_be_used_prevents_parking(rested: Rested, tmp_path: Path) -> None:
    (tmp_path / "parked").touch()

    with pytest.raises(FailedPrecondition, match="parked: Not a directory"):
        await rested.parking.park()


async def test_a_machine_that_does_not_wake_is_still_parked(rested: Rested) -> None:
    await rested.parking.park()
    rested.vm.refusal = ParkError("unpark: Cannot allocate memory")

    with pytest.raises(ResourceExhausted, match="still parked: unpark: Cannot allocate memory; try again"):
        await rested.parking.wake()

    rested.vm.refusal = None
    assert await rested.parking.wake() is not None


async def test_a_machine_whose_memory_is_lost_is_switched_off(rested: Rested) -> None:
    await rested.parking.park()
    rested.vm.refusal = ParkedMemoryLostError(
        "unpark: the file of its memory: record 3: not what was written"
    )

    with pytest.raises(Unavailable, match="record 3"):
        await rested.parking.wake()

    assert "record 3" in rested.switched_off
    assert rested.parking.rest is Rest.LOST


async def test_waking_waits_until_parking_is_done(rested: Rested) -> None:
    parked, woken = await asyncio.gather(rested.parking.park(), rested.parking.wake())

    assert parked is not None
    assert woken is not None
    assert rested.parking.rest is Rest.AWAKE

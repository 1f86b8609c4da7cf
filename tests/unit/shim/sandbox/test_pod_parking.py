"""A pod is parked once all of its containers are paused, and only what that paused is resumed with it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from shim.agent.gate import Gate
from shim.errors import FailedPrecondition, ShimError
from shim.machine.rest import Rest
from shim.sandbox.life import Life
from shim.sandbox.parking import PodParking
from shim.sandbox.process import State
from shim.sandbox.work import Work
from tests.waiting import reached, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from shim.sandbox.guest_container import GuestContainer
    from shim.sandbox.sandbox import Sandbox

SOON_S = 0.001


class Guest:
    """A container that is paused and resumed."""

    def __init__(self, pod: Pod, name: str, state: State) -> None:
        self.id = name
        self.init = SimpleNamespace(state=state)
        self._pod = pod

    async def pause(self) -> None:
        self.init.state = State.PAUSED
        self._pod.parking.consider()

    async def resume(self) -> None:
        await self._pod.parking.wake()
        self.init.state = State.RUNNING
        self._pod.parking.consider()

    async def remember(self) -> None:
        assert self._pod.rest is Rest.AWAKE


class Pod:
    """A pod whose machine is parked and woken without delay."""

    def __init__(self, group: asyncio.TaskGroup, *, park_after_s: float) -> None:
        self.rest = Rest.AWAKE
        self.memory_bytes = 50 << 20
        self.refusal: ShimError | None = None
        self.state = Life.RUNNING
        self.id = "box"
        self.work = Work(group)
        self.guests: list[Guest] = []
        self.notes: list[str] = []
        self.running_machine = SimpleNamespace(
            agent=SimpleNamespace(gate=Gate()), parking=self, park_after_s=park_after_s
        )
        self.parking = PodParking(
            cast("Sandbox", self), lambda: cast("list[GuestContainer]", self.guests), note=self._note
        )

    def while_running(self, begin: Any, *, name: str) -> None:
        assert name
        self.work.spawn(begin(self.running_machine), name=name)

    async def running(self, *, awake: bool = True) -> Any:
        if awake:
            await self.parking.wake()
        return self.running_machine

    async def park(self) -> float:
        if self.refusal is not None:
            raise self.refusal
        self.rest = Rest.PARKED
        return 0.1

    async def wake(self) -> float | None:
        was, self.rest = self.rest, Rest.AWAKE
        return None if was is Rest.AWAKE else 0.1

    def has(self, *states: State) -> list[Guest]:
        self.guests += [Guest(self, f"{number}", state) for number, state in enumerate(states)]
        return self.guests

    def states(self) -> list[State]:
        return [each.init.state for each in self.guests]

    def _note(self, topic: str, *, text: str) -> None:
        assert text
        self.notes.append(topic)


@pytest.fixture(params=[SOON_S])
async def pod(request: pytest.FixtureRequest) -> AsyncIterator[Pod]:
    async with asyncio.TaskGroup() as group:
        made = Pod(group, park_after_s=request.param)
        await settle()
        yield made


never = pytest.mark.parametrize("pod", [0], indirect=True)


async def test_a_pod_whose_containers_are_all_paused_is_parked_and_wakes_with_one(pod: Pod) -> None:
    first, second, _ = pod.has(State.RUNNING, State.PAUSED, State.STOPPED)

    await first.pause()
    await reached(lambda: pod.rest is Rest.PARKED)
    assert pod.parking.condition == "parked"
    await second.resume()

    assert pod.parking.condition == "running"
    assert pod.states() == [State.PAUSED, State.RUNNING, State.STOPPED]
    assert pod.notes == ["/sandbox/parked", "/sandbox/awake"]


@pytest.mark.parametrize("other", [State.RUNNING, State.CREATED])
async def test_a_container_that_is_not_paused_keeps_its_pod_awake(pod: Pod, other: State) -> None:
    first, _ = pod.has(State.RUNNING, other)

    await first.pause()

    with pytest.raises(TimeoutError):
        await reached(lambda: pod.rest is Rest.PARKED, within_s=20 * SOON_S)


@never
async def test_without_a_time_only_an_operator_parks(pod: Pod) -> None:
    first, *_ = pod.has(State.RUNNING)
    await first.pause()
    await settle()
    assert pod.rest is Rest.AWAKE

    await pod.parking.park()

    assert pod.parking.condition == "parked"


@never
async def test_only_what_was_paused_to_park_is_resumed(pod: Pod) -> None:
    pod.has(State.RUNNING, State.PAUSED, State.STOPPED)

    await pod.parking.park()
    assert pod.states() == [State.PAUSED, State.PAUSED, State.STOPPED]
    await pod.parking.unpark()

    assert pod.states() == [State.RUNNING, State.PAUSED, State.STOPPED]


@never
async def test_a_pod_that_cannot_be_parked_runs_again(pod: Pod) -> None:
    pod.has(State.RUNNING)
    pod.refusal = FailedPrecondition("park: the disk is full")

    with pytest.raises(FailedPrecondition, match="disk is full"):
        await pod.parking.park()

    assert pod.states() == [State.RUNNING]


@never
async def test_a_pod_with_a_container_that_waits_for_its_start_is_not_parked(pod: Pod) -> None:
    pod.has(State.RUNNING, State.CREATED)

    with pytest.raises(FailedPrecondition, match="container 1 is not started yet; start or delete it first"):
        await pod.parking.park()

    assert pod.states() == [State.RUNNING, State.CREATED]


@never
async def test_a_signal_resumes_only_what_was_paused_to_park(pod: Pod) -> None:
    first, second = pod.has(State.RUNNING, State.PAUSED)
    await pod.parking.park()

    for each in (first, second):
        await pod.parking.release(cast("GuestContainer", each))

    assert pod.states() == [State.RUNNING, State.PAUSED]
    assert pod.rest is Rest.AWAKE


async def test_a_refusal_is_one_warning(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    first, *_ = pod.has(State.RUNNING)
    pod.refusal = FailedPrecondition("park: the machine goes on in memory: the disk is full")

    await first.pause()
    [warning] = await reached(lambda: caplog.messages)

    assert warning == "park: sandbox box: park: the machine goes on in memory: the disk is full"
    assert pod.rest is Rest.AWAKE

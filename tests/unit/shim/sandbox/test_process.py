"""A process's life follows the transition table, and its exit is reported once."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, cast

import pytest

from shim.agent.guest_names import agent_id
from shim.errors import FailedPrecondition
from shim.sandbox.host_streams import Stdio
from shim.sandbox.process import TRANSITIONS, Input, Process, State

if TYPE_CHECKING:
    from shim.agent.guest_streams import GuestStreams
    from shim.sandbox.host_streams import HostStreams
    from shim.sandbox.stream_copying import StreamCopier


def process_in(state: State) -> Process:
    process = Process("box", exec_id="", stdio=Stdio(), spec={})
    process.state = state
    return process


@pytest.mark.parametrize(("pair", "following"), TRANSITIONS.items(), ids=str)
def test_each_listed_input_moves_to_its_state(pair: tuple[State, Input], following: State) -> None:
    process = process_in(pair[0])
    process.apply(pair[1])
    assert process.state is following


@pytest.mark.parametrize(
    "pair", [p for p in itertools.product(State, Input) if p not in TRANSITIONS], ids=str
)
def test_every_other_input_is_refused_and_changes_nothing(pair: tuple[State, Input]) -> None:
    process = process_in(pair[0])
    with pytest.raises(FailedPrecondition, match=f"{pair[1].value}: container box: it is {pair[0].value}"):
        process.apply(pair[1])
    assert process.state is pair[0]


def test_the_first_reported_exit_wins() -> None:
    process = process_in(State.RUNNING)
    assert process.exit(42)
    assert not process.exit(137)
    assert process.exit_status == 42
    assert process.exited.is_set()


def test_no_two_execs_have_the_same_name_in_the_guest() -> None:
    names = {Process("box", exec_id="shell", stdio=Stdio(), spec={}).agent_id for _ in range(100)}
    assert len(names) == 100


def test_init_has_its_containers_name_in_the_guest() -> None:
    assert Process("box", exec_id="", stdio=Stdio(), spec={}).agent_id == agent_id("box")


@pytest.mark.parametrize("happening", Input, ids=str)
@pytest.mark.parametrize("state", State, ids=str)
def test_an_invalid_transition_is_refused_before_any_work(state: State, happening: Input) -> None:
    process = process_in(state)
    if (state, happening) in TRANSITIONS:
        process.require(happening)
    else:
        with pytest.raises(
            FailedPrecondition, match=f"{happening.value}: container box: it is {state.value}"
        ):
            process.require(happening)
    assert process.state is state


def test_errors_name_an_exec_with_its_container() -> None:
    process = Process("box", exec_id="shell", stdio=Stdio(), spec={})
    assert str(process) == "exec shell of box"
    assert process.event_id == "shell"


class Ends:
    """Streams that record whether they are open."""

    def __init__(self) -> None:
        self.are_open = True

    def close(self) -> None:
        self.are_open = False

    close_all = close


def test_both_ends_of_the_streams_are_closed_only_once() -> None:
    process = process_in(State.STOPPED)
    process.close_streams()
    host, guest = Ends(), Ends()
    process.host_streams, process.guest_streams = cast("HostStreams", host), cast("GuestStreams", guest)
    process.close_streams()
    assert (host.are_open, guest.are_open) == (False, False)
    assert process.host_streams is None


class Copier:
    """A copier whose client has read everything, or never reads it."""

    def __init__(self, *, is_read: bool) -> None:
        self._is_read = is_read

    async def drained(self, _following: set[asyncio.Task[None]]) -> bool:
        return self._is_read


@pytest.mark.parametrize("is_read", [True, False])
async def test_unread_output_is_dropped_with_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture, *, is_read: bool
) -> None:
    process = process_in(State.STOPPED)
    await process.drained()
    endless = asyncio.Event()

    async def follow() -> None:
        await endless.wait()

    process.following = asyncio.create_task(follow())
    process.copier = cast("StreamCopier", Copier(is_read=is_read))
    await process.drained()
    assert process.following.cancelled() is not is_read
    assert ("output not read" in caplog.text) is not is_read
    endless.set()
    await asyncio.wait([process.following])

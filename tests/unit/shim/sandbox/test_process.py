"""A process's life follows its table, and its exit is reported once."""

from __future__ import annotations

import itertools

import pytest

from shim.agent.guest_names import agent_id
from shim.errors import FailedPrecondition
from shim.sandbox.host_streams import Stdio
from shim.sandbox.process import TRANSITIONS, Input, Process, State


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


def test_an_exec_never_reuses_the_name_it_has_in_the_guest() -> None:
    names = {Process("box", exec_id="shell", stdio=Stdio(), spec={}).agent_id for _ in range(100)}
    assert len(names) == 100


def test_init_has_the_name_of_its_container_in_the_guest() -> None:
    assert Process("box", exec_id="", stdio=Stdio(), spec={}).agent_id == agent_id("box")

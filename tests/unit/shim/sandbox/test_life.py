"""The life of a sandbox's machine follows its table."""

from __future__ import annotations

import itertools

import pytest

from shim.errors import FailedPrecondition
from shim.sandbox.life import OVER, TRANSITIONS, Happening, Life, following


@pytest.mark.parametrize(("pair", "expected"), TRANSITIONS.items(), ids=str)
def test_each_listed_input_leads_to_its_state(pair: tuple[Life, Happening], expected: Life) -> None:
    assert following(*pair) is expected


@pytest.mark.parametrize(
    "pair", [pair for pair in itertools.product(Life, Happening) if pair not in TRANSITIONS], ids=str
)
def test_every_other_input_is_refused(pair: tuple[Life, Happening]) -> None:
    state, happening = pair
    with pytest.raises(FailedPrecondition, match=f"^{happening.value}: the sandbox is {state.value}$"):
        following(state, happening)


def test_the_end_may_be_wanted_in_every_state() -> None:
    assert {state for state, happening in TRANSITIONS if happening is Happening.END_WANTED} == set(Life)


def test_nothing_leads_out_of_the_end() -> None:
    assert {after for (before, _), after in TRANSITIONS.items() if before in OVER} == OVER
    assert all(after is before for (before, _), after in TRANSITIONS.items() if before in OVER)


def test_a_machine_is_started_once() -> None:
    assert [state for state, happening in TRANSITIONS if happening is Happening.START] == [Life.AWAITED]

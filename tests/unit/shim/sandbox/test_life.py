"""The life of a sandbox's machine follows the transition table."""

from __future__ import annotations

import itertools
from pathlib import Path

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


def test_an_end_may_be_requested_in_every_state() -> None:
    assert {state for state, happening in TRANSITIONS if happening is Happening.END_WANTED} == set(Life)


def test_no_transition_leaves_the_final_states() -> None:
    assert {after for (before, _), after in TRANSITIONS.items() if before in OVER} == OVER
    assert all(after is before for (before, _), after in TRANSITIONS.items() if before in OVER)


def test_a_machine_is_started_only_once() -> None:
    assert [state for state, happening in TRANSITIONS if happening is Happening.START] == [Life.AWAITED]


def test_the_documentation_shows_this_table() -> None:
    names = {"awaited": Life.AWAITED, "dead": Life.DIED, **{each.value: each for each in Life}}
    text = (Path(__file__).parents[4] / "docs" / "design" / "route-death.md").read_text(encoding="utf-8")
    _, table = text.split("|---|---|---|---|---|\n")
    shown: dict[tuple[Life, Happening], Life] = {}
    for line in table.partition("\n\n")[0].splitlines():
        state, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        before = names[state.split()[0].rstrip(":")]
        shown |= {(before, each): names[cell] for each, cell in zip(Happening, cells, strict=True) if cell}
    assert shown == TRANSITIONS

"""The rest of a machine follows its table."""

from __future__ import annotations

import itertools

import pytest

from shim.errors import FailedPrecondition
from shim.machine.rest import TRANSITIONS, Rest, RestInput, following


@pytest.mark.parametrize(("pair", "expected"), TRANSITIONS.items(), ids=str)
def test_each_listed_input_leads_to_its_state(pair: tuple[Rest, RestInput], expected: Rest) -> None:
    assert following(*pair) is expected


@pytest.mark.parametrize(
    "pair", [pair for pair in itertools.product(Rest, RestInput) if pair not in TRANSITIONS], ids=str
)
def test_every_other_input_is_refused(pair: tuple[Rest, RestInput]) -> None:
    rest, happening = pair
    with pytest.raises(FailedPrecondition, match=f"^{happening.value}: the machine is {rest.value}$"):
        following(rest, happening)


def test_a_failure_leads_back_to_where_the_memory_is() -> None:
    for (before, happening), after in TRANSITIONS.items():
        if happening is RestInput.FAILED:
            assert after is {Rest.PARKING: Rest.AWAKE, Rest.WAKING: Rest.PARKED}[before]

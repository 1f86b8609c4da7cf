"""Whether a running machine is awake or parked: a table of (state, input). Pure."""

from __future__ import annotations

import enum

from shim.errors import FailedPrecondition


class Rest(enum.Enum):
    """Whether a machine runs, or its memory is in a file."""

    AWAKE = "awake"
    PARKING = "being parked"
    PARKED = "parked"
    WAKING = "waking"
    LOST = "lost"
    """Its memory is lost; the machine is being switched off."""


class RestInput(enum.Enum):
    """The events that change it."""

    PARK = "park"
    WAKE = "wake"
    DONE = "done"
    FAILED = "failed"
    MEMORY_LOST = "memory lost"


TRANSITIONS: dict[tuple[Rest, RestInput], Rest] = {
    (Rest.AWAKE, RestInput.PARK): Rest.PARKING,
    (Rest.PARKING, RestInput.DONE): Rest.PARKED,
    (Rest.PARKING, RestInput.FAILED): Rest.AWAKE,
    (Rest.PARKED, RestInput.WAKE): Rest.WAKING,
    (Rest.WAKING, RestInput.DONE): Rest.AWAKE,
    (Rest.WAKING, RestInput.FAILED): Rest.PARKED,
    (Rest.WAKING, RestInput.MEMORY_LOST): Rest.LOST,
}


def following(rest: Rest, happening: RestInput) -> Rest:
    """Look up the next state.

    :raises FailedPrecondition: if the table has no such transition.
    """
    found = TRANSITIONS.get((rest, happening))
    if found is None:
        raise FailedPrecondition(f"{happening.value}: the machine is {rest.value}")
    return found

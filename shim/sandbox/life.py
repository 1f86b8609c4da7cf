"""The life of a sandbox's machine: a table of (state, input). Pure."""

from __future__ import annotations

import enum

from shim.errors import FailedPrecondition


class Life(enum.Enum):
    """The state of a sandbox's machine."""

    AWAITED = "not created yet"
    BOOTING = "booting"
    RUNNING = "running"
    ENDING = "ending"
    """containerd has asked for the end; until then, a running machine still answers."""
    STOPPED = "stopped"
    DIED = "dead"
    """It ended, or did not start, although containerd had not asked for the end."""


class Happening(enum.Enum):
    """The events in the machine's life."""

    START = "start"
    READY = "ready"
    END_WANTED = "end"
    GONE = "gone"


TRANSITIONS: dict[tuple[Life, Happening], Life] = {
    (Life.AWAITED, Happening.START): Life.BOOTING,
    (Life.AWAITED, Happening.END_WANTED): Life.STOPPED,
    (Life.BOOTING, Happening.READY): Life.RUNNING,
    (Life.BOOTING, Happening.END_WANTED): Life.ENDING,
    (Life.BOOTING, Happening.GONE): Life.DIED,
    (Life.RUNNING, Happening.END_WANTED): Life.ENDING,
    (Life.RUNNING, Happening.GONE): Life.DIED,
    # While it is being switched off, a machine may still start, and containerd may ask again.
    (Life.ENDING, Happening.READY): Life.ENDING,
    (Life.ENDING, Happening.END_WANTED): Life.ENDING,
    (Life.ENDING, Happening.GONE): Life.STOPPED,
    (Life.STOPPED, Happening.END_WANTED): Life.STOPPED,
    (Life.DIED, Happening.END_WANTED): Life.DIED,
}

OVER = frozenset({Life.STOPPED, Life.DIED})
"""The final states."""


def following(state: Life, happening: Happening) -> Life:
    """Look up the next state.

    :raises FailedPrecondition: if the table has no such transition.
    """
    found = TRANSITIONS.get((state, happening))
    if found is None:
        raise FailedPrecondition(f"{happening.value}: the sandbox is {state.value}")
    return found

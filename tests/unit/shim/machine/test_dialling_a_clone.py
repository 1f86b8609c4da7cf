"""A clone that the host leaves no processor is waited for; one that had its time is not."""

from __future__ import annotations

import pytest

from hypervisor import ChannelError, GuestLateError
from shim.machine.cloning import dial_clone


class Clone:
    """A machine that answers at a certain attempt, on a host that is busy until another."""

    def __init__(self, *, answers_at, starved_until, error=GuestLateError):
        self.attempts = 0
        self._error = error
        self._answers_at = answers_at
        self._starved_until = starved_until

    @property
    def is_starved(self):
        return self.attempts < self._starved_until

    async def connect(self, port, *, timeout_s):  # noqa: ARG002 - as the machine has it
        self.attempts += 1
        if self.attempts < self._answers_at:
            raise self._error(f"attempt {self.attempts}")
        return f"connection to {port}"


@pytest.mark.parametrize(("answers_at", "starved_until"), [(1, 0), (2, 2), (4, 9)])
async def test_a_clone_is_waited_for_while_it_is_starved(answers_at, starved_until):
    clone = Clone(answers_at=answers_at, starved_until=starved_until)
    assert await dial_clone(clone, 1024, timeout_s=1) == "connection to 1024"


@pytest.mark.parametrize(("starved_until", "attempts"), [(0, 1), (3, 3), (99, 4)])
async def test_a_clone_is_given_up_once_it_had_its_time(starved_until, attempts):
    clone = Clone(answers_at=99, starved_until=starved_until)
    with pytest.raises(GuestLateError, match=f"attempt {attempts}"):
        await dial_clone(clone, 1024, timeout_s=1)


async def test_a_clone_that_ended_is_not_waited_for():
    clone = Clone(answers_at=99, starved_until=99, error=ChannelError)
    with pytest.raises(ChannelError, match="attempt 1"):
        await dial_clone(clone, 1024, timeout_s=1)

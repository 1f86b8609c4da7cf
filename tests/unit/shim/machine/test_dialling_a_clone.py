"""A clone gets more time only if the host had no processor for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from hypervisor import ChannelError, GuestLateError
from shim.machine.cloning import dial_clone

if TYPE_CHECKING:
    import socket

    from hypervisor import errors
    from hypervisor.qemu import QemuHypervisor


CONNECTION = cast("socket.socket", object())


class Clone:
    """A machine that answers at one attempt, on a host that is busy until another attempt."""

    def __init__(
        self,
        *,
        answers_at: int,
        starved_until: int,
        error: type[errors.ChannelError | errors.GuestLateError] = GuestLateError,
    ) -> None:
        self.attempts = 0
        self._error = error
        self._answers_at = answers_at
        self._starved_until = starved_until

    @property
    def is_starved(self) -> bool:
        return self.attempts < self._starved_until

    async def connect(self, port: int, *, timeout_s: int) -> socket.socket:  # noqa: ARG002 - the machine's signature
        self.attempts += 1
        if self.attempts < self._answers_at:
            raise self._error(f"attempt {self.attempts}")
        return CONNECTION


@pytest.mark.parametrize(("answers_at", "starved_until"), [(1, 0), (2, 2), (4, 9)])
async def test_a_clone_is_waited_for_while_it_gets_no_processor_time(
    answers_at: int, starved_until: int
) -> None:
    clone = Clone(answers_at=answers_at, starved_until=starved_until)
    assert await dial_clone(cast("QemuHypervisor", clone), 1024, timeout_s=1) is CONNECTION


@pytest.mark.parametrize(("starved_until", "attempts"), [(0, 1), (3, 3), (99, 4)])
async def test_a_clone_that_had_enough_processor_time_is_given_up(starved_until: int, attempts: int) -> None:
    clone = Clone(answers_at=99, starved_until=starved_until)
    with pytest.raises(GuestLateError, match=f"attempt {attempts}"):
        await dial_clone(cast("QemuHypervisor", clone), 1024, timeout_s=1)


async def test_a_clone_that_ended_is_not_waited_for() -> None:
    clone = Clone(answers_at=99, starved_until=99, error=ChannelError)
    with pytest.raises(ChannelError, match="attempt 1"):
        await dial_clone(cast("QemuHypervisor", clone), 1024, timeout_s=1)

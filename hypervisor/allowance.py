"""How much work a guest may cause: a little at any time, and a lot now and then (a token bucket)."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Allowance:
    """An amount that is used up and comes back with time.

    :param burst: how much may be used at once.
    :param per_s: how much comes back in a second, up to ``burst``.
    :param clock: tells the time in seconds.
    """

    def __init__(self, *, burst: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._left = burst
        self._at_s = clock()

    def take(self, amount: float = 1.0) -> bool:
        """Use some of it up, if that much is left.

        :param amount: how much.
        :returns: whether there was enough.
        """
        now_s = self._clock()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left < amount:
            return False
        self._left -= amount
        return True

    async def wait(self, amount: float = 1.0) -> None:
        """Use some of it up, as soon as that much is left.

        :param amount: how much, not more than ``burst``.
        """
        while not self.take(amount):  # noqa: ASYNC110 - it waits only for time
            await asyncio.sleep((amount - self._left) / self._per_s)

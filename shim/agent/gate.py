"""The gate in front of a guest: it is closed while the guest's machine is parked.

A request that needs an answer wakes the machine, which opens the gate. A wait for the guest's own events, and
a client's input to a paused process, wait until another request opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


class Gate:
    """The gate in front of one guest; it is open at first."""

    def __init__(self) -> None:
        #: Wakes the machine, which opens the gate, or fails.
        self.wake: Callable[[], Awaitable[object]] | None = None
        self._is_closed = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._free = asyncio.Event()
        self._free.set()

    @property
    def is_closed(self) -> bool:
        """Whether a request would wake the machine."""
        return self._is_closed

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def asking(self) -> contextlib.AbstractContextManager[None]:
        """Wake the machine if it is parked.

        :returns: a context; while it is entered, the gate is not closed.
        :raises ShimError: if the machine does not wake.
        """
        while self._is_closed:
            await self.woken()
        return self._counted()

    async def woken(self) -> None:
        """Wake the machine if it is parked or is being parked.

        :raises ShimError: if it does not wake.
        """
        if self.wake is not None:
            await self.wake()

    async def free(self) -> None:
        """Wait until the gate is neither held nor closed."""
        await self._free.wait()

    async def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Like :meth:`asking`, but wait until another request wakes the machine."""
        await self._free.wait()
        return self._counted()

    def hold(self) -> None:
        """Admit only requests that need an answer."""
        self._free.clear()

    async def close(self) -> None:
        """Admit no request, once all pending ones have their answers; :meth:`hold` comes first."""
        while self._inside:
            self._empty.clear()
            await self._empty.wait()
        self._is_closed = True

    def admit(self) -> None:
        """Admit requests that need an answer."""
        self._is_closed = False

    def open(self) -> None:
        """Admit every request, also those that only wait."""
        self._is_closed = False
        self._free.set()

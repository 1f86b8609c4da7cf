"""How a unit test waits: for an event, with a deadline, and never for time alone."""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable

    T = TypeVar("T")

WITHIN_S = patient(60.0)
_LOOK_AGAIN_S = 0.01
_PASSES = 20


async def settle() -> None:
    """Let every task and callback of the loop go as far as it can without another thread or process."""
    for _ in range(_PASSES):
        await asyncio.sleep(0)


async def reached(condition: Callable[[], T], *, within_s: float = WITHIN_S) -> T:
    """Wait, while the loop runs, until a condition is true; for changes that raise no event.

    :param condition: it is asked again and again.
    :param within_s: how long it may take, in seconds.
    :returns: the true value.
    :raises TimeoutError: if it stays false.
    """
    async with asyncio.timeout(within_s):
        while not (found := condition()):  # noqa: ASYNC110  (it raises no event)
            await asyncio.sleep(_LOOK_AGAIN_S)
    return found


def until(condition: Callable[[], T], *, within_s: float = WITHIN_S) -> T:
    """Wait, outside a loop, until a condition is true; for changes that raise no event.

    :param condition: it is asked again and again.
    :param within_s: how long it may take, in seconds.
    :returns: the true value.
    :raises TimeoutError: if it stays false.
    """
    deadline, never = time.monotonic() + within_s, threading.Event()
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s:g} s")
        never.wait(_LOOK_AGAIN_S)
    return found


def ends(pid: int, *, within_s: float = WITHIN_S) -> bool:
    """Wait for the end of a process, child or not.

    :param pid: its process id.
    :param within_s: how long it may take, in seconds.
    :returns: whether it has ended.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], within_s)[0])
    finally:
        os.close(pidfd)

"""Turns: only as many machines work on a start at the same time as the host has processors.

A start under emulation needs mostly processor time. Machines that share a processor take longer together than
one after another, because each switch costs a timer interrupt and cold caches.

The turns are FIFOs in a directory. A process that has a turn has its FIFO locked and open for writing. A
process that waits has all of them open for reading, and the kernel tells it when a writer is gone, even if
that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import Accelerator
from shim.host import private_directory
from shim.telemetry import timeline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

log = logging.getLogger(__name__)

DIRECTORY = Path("/run/hako/turns")
_PATIENCE_S = 60.0
"""After this wait, a machine continues without a turn. The kubelet gives a pod two minutes."""
_LONGEST_S = 10.0
"""A turn ends after this time, even if its work has not ended: hanging machines must not block others."""


@contextlib.asynccontextmanager
async def turn_of(accelerator: Accelerator, *, lane: str, given_up: asyncio.Event) -> AsyncIterator[None]:
    """Run the block when the host has a processor for it; for work of a guest that a client waits for.

    :param accelerator: how the guest's instructions are run; only emulation has turns.
    :param lane: the lane of the timeline in which the wait is recorded.
    :param given_up: ends the wait once it is set.
    """
    if accelerator is not Accelerator.TCG:
        yield
        return
    at_once = len(os.sched_getaffinity(0))
    async with contextlib.AsyncExitStack() as stack:
        with timeline.phase("wait for a turn", lane=lane):
            await stack.enter_async_context(turn(DIRECTORY, at_once=at_once, given_up=given_up))
        yield


@contextlib.asynccontextmanager
async def turn(directory: Path, *, at_once: int, given_up: asyncio.Event) -> AsyncIterator[None]:
    """Wait for a turn and keep it for the block, but at most for ten seconds.

    Turns only save time, so the block always runs, without a turn if the wait is too long or fails.

    :param directory: the directory of the turns; it is made if necessary.
    :param at_once: how many there are.
    :param given_up: ends the wait once it is set.
    """
    held: int | None = None
    try:
        held = await _wait(directory, at_once=at_once, given_up=given_up)
    except OSError as error:
        log.warning("turns: %s: %s; starts without one", error.filename or directory, error.strerror)
    if held is None:
        yield
        return
    with contextlib.ExitStack() as turn_held:
        turn_held.callback(os.close, held)
        end = asyncio.get_running_loop().call_later(_LONGEST_S, turn_held.close)
        try:
            yield
        finally:
            end.cancel()


async def _wait(directory: Path, *, at_once: int, given_up: asyncio.Event) -> int | None:
    """Return the descriptor that ends the turn when it is closed; None if the wait was too long."""
    paths = _make(directory, at_once)
    held = _take_any(paths)
    if held is not None:
        return held
    with contextlib.ExitStack() as stack:
        # Opened before the next attempt, so that no end of a turn can be missed from here on.
        writers = [os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) for path in paths]
        for writer in writers:
            stack.callback(os.close, writer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                while not given_up.is_set() and (held := _take_any(paths)) is None:
                    await _any_gone(writers, given_up)
    return held


def _make(directory: Path, count: int) -> list[str]:
    private_directory.make(str(directory))
    paths = [str(directory / str(number)) for number in range(count)]
    for path in paths:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
    return paths


def _take_any(paths: Iterable[str]) -> int | None:
    for path in paths:
        # For reading, too: opening a FIFO only for writing would block without a reader.
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EWOULDBLOCK:
                raise
        else:
            return descriptor
    return None


async def _any_gone(writers: Iterable[int], given_up: asyncio.Event) -> None:
    """Wait until a FIFO has no writer."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    waits = [loop.create_task(event.wait()) for event in (gone, given_up)]
    for writer in writers:
        loop.add_reader(writer, gone.set)
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for writer in writers:
            loop.remove_reader(writer)
        for wait in waits:
            wait.cancel()

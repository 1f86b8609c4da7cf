"""Keeps a guest's clock equal to the host's.

The shim asks the guest for its time, and tells it by how much to move its clock. A comparison may be wrong by
half of the time that the answer took. Several answers together reduce this uncertainty. If it is too large,
as on a busy host, the shim soon asks again. It compares the clocks when the machine is up, and again

* when the host's clock is set, or the host wakes from a sleep, during which a guest's clock stands still;
* when QEMU continues after a stop: a guest's timer may have wrapped around (an emulated one does in 43 s);
* every minute, because NTP corrects the rate of the host's clock by up to 50 millionths, of which a guest
  learns nothing under KVM. That is 3 ms in a minute. An emulated timer has the corrected rate.

Kata's agent cannot report its time. Its clock is only set, at the start and in the first two cases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.errors import DeadlineExceeded, ShimError, Unavailable
from shim.host import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shim.agent.client import Agent

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
SOON_S = 0.5
TOLERANCE_NS = 1_000_000
_MOST_ANSWERS = 8
_GOOD_DOUBT_NS = 1_500_000
_MOST_TRIALS = 20


@dataclass(frozen=True, slots=True)
class Reading:
    """One comparison of a guest's clock with the host's.

    :param ahead_ns: how far the guest's clock is ahead, in nanoseconds.
    :param doubt_ns: by how much that may be wrong, in nanoseconds.
    """

    ahead_ns: int
    doubt_ns: int


def reading(answer: str, *, asked_at_ns: int, answered_at_ns: int) -> Reading:
    """Compare the clocks by the guest's answer.

    :param answer: its time in nanoseconds since 1970; then how far that is ahead, if the guest knows it.
    :param asked_at_ns: the host's time when it was asked.
    :param answered_at_ns: the host's time when it had answered.
    :raises ValueError: if it is not such an answer.
    """
    guests, *ahead = answer.split()
    if ahead:
        return Reading(int(ahead[0]), 0)
    return Reading(int(guests) - (asked_at_ns + answered_at_ns) // 2, (answered_at_ns - asked_at_ns) // 2)


def together(readings: Sequence[Reading]) -> Reading:
    """Combine several readings.

    :param readings: at least one.
    :returns: the middle of what all of them allow; if they contradict each other, the most precise one.
    """
    least = max(one.ahead_ns - one.doubt_ns for one in readings)
    most = min(one.ahead_ns + one.doubt_ns for one in readings)
    if least > most:
        return min(readings, key=lambda one: one.doubt_ns)
    return Reading((least + most) // 2, (most - least) // 2)


def correction(found: Reading) -> int:
    """Choose by how much to move a guest's clock; 0 if no error is certain.

    :returns: nanoseconds.
    """
    return -found.ahead_ns if abs(found.ahead_ns) > max(found.doubt_ns, TOLERANCE_NS) else 0


async def keep(agent: Agent, *, pid: int, right: asyncio.Event) -> None:
    """Keep a guest's clock right until the guest ends.

    :param agent: its agent.
    :param pid: the pid of QEMU, a child of this process.
    :param right: set when the clock has been compared for the first time, or cannot be.
    """
    woken = asyncio.Event()
    try:
        with _watching(woken.set, pid=pid):
            trials = 0
            while True:
                with await agent.gate.waiting():
                    sure = await set_right(agent)
                right.set()
                trials = 0 if sure else trials + 1
                pause_s = SOON_S if 0 < trials < _MOST_TRIALS else INTERVAL_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s if agent.tells_time else None):
                        await woken.wait()
                        trials = 0
                woken.clear()
    except (ShimError, OSError) as error:
        log.warning("clock: it is no longer kept right: %s", error)
    finally:
        right.set()


async def set_right(agent: Agent) -> bool:
    """Compare the clocks and move the guest's; return whether it is certainly right then.

    :param agent: the guest's.
    :raises ShimError: if it does not answer.
    """
    if not agent.tells_time:
        await agent.set_time()
        return True
    readings: list[Reading] = []
    while len(readings) < _MOST_ANSWERS:
        asked_at_ns = time.time_ns()
        try:
            answer = await agent.ask_time()
            readings.append(reading(answer, asked_at_ns=asked_at_ns, answered_at_ns=time.time_ns()))
        except DeadlineExceeded:
            return False
        except ValueError as error:
            raise Unavailable(f"the guest's time is {answer!r}") from error
        if together(readings).doubt_ns <= _GOOD_DOUBT_NS:
            break
    found = together(readings)
    shift_ns = correction(found)
    if shift_ns:
        await agent.move_time(shift_ns)
        log.debug("clock: moved by %.1f ms, give or take %.1f ms", shift_ns / 1e6, found.doubt_ns / 1e6)
    return found.doubt_ns <= _GOOD_DOUBT_NS


@contextlib.contextmanager
def _watching(notify: Callable[[], None], *, pid: int) -> Iterator[None]:
    """In the block, watch for events after which a guest's clock is behind.

    :param notify: called at each event.
    :param pid: the pid of QEMU.
    """
    loop = asyncio.get_running_loop()
    watch = kernel.open_clock_watch()

    def clock_was_set() -> None:
        nonlocal watch
        loop.remove_reader(watch)
        os.close(watch)
        watch = kernel.open_clock_watch()
        loop.add_reader(watch, clock_was_set)
        notify()

    def child_changed() -> None:
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WCONTINUED | os.WNOHANG) is not None:
                notify()

    loop.add_reader(watch, clock_was_set)
    loop.add_signal_handler(signal.SIGCHLD, child_changed)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGCHLD)
        loop.remove_reader(watch)
        os.close(watch)

"""Threads that carry out requests; they are reused, because new threads cost much under emulation."""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_idle: list[_Worker] = []


class _Worker:
    """One thread and the work it is about to do."""

    __slots__ = ("_handed", "_work")

    def __init__(self) -> None:
        self._handed = _thread.allocate_lock()
        self._handed.acquire()
        self._work: Callable[[], None]

    def hand(self, work: Callable[[], None]) -> None:
        self._work = work
        self._handed.release()

    def run(self) -> None:
        while True:
            self._handed.acquire()
            self._work()
            del self._work
            _idle.append(self)


def prepare(count: int) -> None:
    """Start threads before there is work for them.

    :param count: how many.
    """
    for _ in range(count):
        worker = _Worker()
        _thread.start_new_thread(worker.run, ())
        _idle.append(worker)


def submit(work: Callable[[], None]) -> None:
    """Run work on an idle thread, or on a new one if there is none.

    :param work: what to do; must not raise.
    """
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
        _thread.start_new_thread(worker.run, ())
    worker.hand(work)

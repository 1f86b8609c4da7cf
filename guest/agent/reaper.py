"""Collects the exit statuses of all processes of the machine: process 1 inherits all orphans."""

from __future__ import annotations

import _thread
import os
import select
import time

from guest.agent import files, kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self


class Exit:
    """The end of one process, past or future.

    :param fd: an event descriptor that becomes readable forever when the process has ended.
    """

    __slots__ = ("at", "fd", "status")

    def __init__(self) -> None:
        self.fd = os.eventfd(0)
        self.status: int | None = None
        self.at = 0.0

    def set(self, status: int) -> None:
        """Record the end.

        :param status: the exit code, or 128 plus the signal's number.
        """
        self.at = time.monotonic()
        self.status = status
        os.eventfd_write(self.fd, 1)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end.

        :param timeout_s: when to give up.
        :returns: whether it has come.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(int(timeout_s * 1000)))

    def __del__(self) -> None:
        os.close(self.fd)


_OOM_SCORE_ADJ = "/proc/self/oom_score_adj"

_lock = _thread.allocate_lock()
# Until then, a child has the agent's score, which it must not keep.
_spawning = _thread.allocate_lock()
_watched: dict[int, Exit] = {}
_unclaimed: dict[int, int] = {}
_launching = 0


def collect() -> None:
    """Collect every process that has ended; the signal loop calls this on SIGCHLD."""
    while True:
        with _lock:
            try:
                pid, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            status = os.waitstatus_to_exitcode(raw)
            status = 128 - status if status < 0 else status
            watcher = _watched.pop(pid, None)
            if watcher is not None:
                watcher.set(status)
            elif _launching:
                _unclaimed[pid] = status


class Launch:
    """While one is open, statuses of processes that are not watched yet are kept.

    A child may end before its id is known.
    """

    def __enter__(self) -> Self:
        global _launching  # noqa: PLW0603  counts the open launches of all threads
        with _lock:
            _launching += 1
        return self

    def __exit__(self, *_: object) -> None:
        global _launching  # noqa: PLW0603  as above
        with _lock:
            _launching -= 1
            if not _launching:
                _unclaimed.clear()

    def watch(self, pid: int) -> Exit:
        """Watch a process that was started in this launch.

        :param pid: its id.
        :returns: its end, perhaps past already.
        """
        end = Exit()
        with _lock:
            status = _unclaimed.pop(pid, None)
            if status is None:
                _watched[pid] = end
        if status is not None:
            end.set(status)
        return end

    def spawn(
        self, path: str, argv: list[str], stdio: Iterable[int], *, oom_score_adj: int = 0
    ) -> tuple[int, Exit]:
        """Start a program with the agent's environment and default signal handling.

        :param path: the program.
        :param argv: its name and arguments.
        :param stdio: descriptors for its 0, 1 and 2.
        :param oom_score_adj: how readily the kernel kills it for memory.
        :returns: its process id and its end.
        :raises OSError: if it cannot be started.
        """
        with _spawning:
            if oom_score_adj:
                files.write(_OOM_SCORE_ADJ, str(oom_score_adj))
            try:
                pid = kernel.spawn(path, argv, os.environ, stdio)
            finally:
                if oom_score_adj:
                    files.write(_OOM_SCORE_ADJ, "0")
        return pid, self.watch(pid)


def signal(pid: int, end: Exit, number: int) -> bool:
    """Send a signal to a watched process, but never to another one that has got its id since.

    :param pid: its id.
    :param end: its end.
    :param number: the signal.
    :returns: False if it has ended.
    """
    with _lock:
        if end.status is not None:
            return False
        os.kill(pid, number)
        return True

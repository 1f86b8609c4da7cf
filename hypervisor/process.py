"""Child processes: they end with this process, and their death is an event with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hypervisor.exits import ExitStatus, last_words
from hypervisor.launcher import launch
from hypervisor.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hypervisor.confinement import Confinement

log = logging.getLogger("hypervisor.output")

_OUTPUT_LIMIT = 64 * 1024
_LOGGED_LINES = 1000  # for a process's output, which an attacker who has taken it over may flood
_CAUSE_LINES = 3
LINE_LIMIT = 400
"""The most characters of a line that are shown."""

_REAPING_S = 1.0

_NO_SETUID_FIXUP = "+no_setuid_fixup"  # capabilities(7), under "The securebits flags"
_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    # Causes of failure are shown to operators; they should not depend on the host's language.
    "LC_ALL": "C",
}


class ChildProcess:
    """A supervised process: its end is an event, and its last output is kept.

    Must be created on the main thread: the kernel ties the death signal to the thread that spawned the
    process. No other part of this program may reap children that it did not start.

    :param name: the role of the process; used in errors and in the ledger.
    :param pid: its process id. The process must not have been reaped.
    :param output: the read end of the pipe for its output, or ``None`` if it has no pipe.
    :param logged_lines: how many lines of its output are logged.
    """

    def __init__(
        self, name: str, pid: int, *, output: int | None = None, logged_lines: int = _LOGGED_LINES
    ) -> None:
        self.name = name
        self.pid = pid
        self.is_confined = False
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(pid)
        self._output_fd = output
        self._output = bytearray()
        self._lines_to_log = logged_lines
        self.workers: list[ChildProcess] = []
        """The processes that this one has forked, as ``adopt_workers`` found them."""
        self.exited: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)
        if output is not None:
            os.set_blocking(output, False)
            self._loop.add_reader(output, self._read_output)

    @classmethod
    def spawn(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        inherit: Iterable[int] = (),
        huge_pages: bool = True,
        keeps_capabilities: bool = False,
        confinement: Confinement | None = None,
        logged_lines: int = _LOGGED_LINES,
    ) -> Self:
        """Start a program that the kernel kills when this thread ends.

        If this thread ends in the millisecond before ``setpriv`` has requested the signal, the program stays.
        So the cleanup after a killed shim must still look for the recorded processes.

        :param name: the role of the process.
        :param argv: the program and its arguments.
        :param inherit: descriptors the program gets under the same numbers; it gets no others but 0 to 2.
        :param huge_pages: whether its memory may be of huge pages, if it asks for them.
        :param keeps_capabilities: whether a thread keeps its capabilities when it becomes another user.
        :param confinement: its rights; ``None`` for those of this process.
        :param logged_lines: how many lines of its output are logged.
        :raises NotImplementedError: as ``launch``.
        :raises OSError: if no process could be made. A program that cannot be executed is not an error
            here: the process ends at once with status 127 and a line in its output.
        """
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            if confinement is not None:
                pid = launch(
                    argv,
                    _ENVIRONMENT,
                    output=write_end,
                    inherit=inherit,
                    confinement=confinement,
                    huge_pages=huge_pages,
                )
                confined = cls(name, pid, output=read_end, logged_lines=logged_lines)
                confined.is_confined = True
                return confined
            with contextlib.nullcontext() if huge_pages else _no_huge_pages():
                pid = os.posix_spawnp(
                    "setpriv",
                    [
                        *("setpriv", "--pdeathsig", "KILL"),
                        *(("--securebits", _NO_SETUID_FIXUP) if keeps_capabilities else ()),
                        *("--", *argv),
                    ],
                    _ENVIRONMENT,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, write_end, 1),
                        (os.POSIX_SPAWN_DUP2, write_end, 2),
                        # A descriptor duplicated onto itself: posix_spawn then clears close-on-exec, only in
                        # the child.
                        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherit),
                    ],
                    # A terminal's signals reach only this process, which then ends the child in order.
                    setsid=True,
                    setsigmask=(),
                    setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
                )
        except (OSError, NotImplementedError):
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        return cls(name, pid, output=read_end, logged_lines=logged_lines)

    async def ended_well(self, *, timeout_s: float) -> bool:
        """Wait for a program that only prints something, and kill it if it takes too long.

        :param timeout_s: how long it may take, in seconds.
        :returns: whether it ended, with status 0.
        """
        await asyncio.wait([self.exited], timeout=timeout_s)
        self.kill()
        return (await self.exited).code == 0

    @property
    def is_starved(self) -> bool:
        """Whether the live process has waited for processors longer than it has used them."""
        return waits_more_than_it_runs(_of_threads(self.pid, "schedstat"))

    def adopt_workers(self) -> None:
        """Find the processes that this one has forked so far, so that ``destroy`` also ends them."""
        known = {worker.pid for worker in self.workers}
        for pid in _children(self.pid):
            if pid not in known:
                with contextlib.suppress(ProcessLookupError):
                    self.workers.append(ChildProcess(self.name, pid))

    async def destroy(self) -> None:
        """Kill the process and its workers; return when all are gone and none is a zombie."""
        if not self.exited.done():
            self.adopt_workers()
        for worker in self.workers:
            worker.kill()
        if self.workers:
            # A parent that outlives its worker reaps the worker and ends.
            await asyncio.wait([self.exited], timeout=_REAPING_S)
        self.kill()
        await asyncio.wait([self.exited, *(worker.exited for worker in self.workers)])
        for worker in self.workers:
            worker.bury()

    def bury(self) -> None:
        """Reap a process that became a child when its parent died. May be called repeatedly."""
        if self._pidfd >= 0:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            os.close(self._pidfd)
            self._pidfd = -1

    def kill(self) -> None:
        """Kill the process if it still lives; ``exited`` tells when it is gone."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def output(self) -> str:
        """Return the last part of the process's standard output and error."""
        return self._output.decode(errors="replace")

    def last_words(self) -> str:
        """Return the last lines of the output that may explain its end, joined into one."""
        lines = last_words(self.output(), self.exited.result() if self.exited.done() else None)
        return "; ".join(printable(line, limit=LINE_LIMIT) for line in lines[-_CAUSE_LINES:])

    def obituary(self) -> str:
        """Say in one line how the process ended. It must have ended."""
        words = self.last_words()
        return f"{self.name} {self.exited.result()}" + (f": {words}" if words else "")

    def _reap(self) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            # The dead child of another process: its status is unknown. If the parent dies without having
            # reaped it, it may become a child of this process; so the descriptor is kept for bury().
            self._loop.remove_reader(self._pidfd)
            self.exited.set_result(ExitStatus())
            return
        else:
            if result is None:
                return
            if result.si_code == os.CLD_EXITED:
                status = ExitStatus(code=result.si_status)
            else:
                status = ExitStatus(signal=result.si_status)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._read_output()
        self._close_output()
        self.exited.set_result(status)

    def _read_output(self) -> None:
        # One read at a time: a program that floods its output must not block the event loop. The limit is the
        # size of a pipe, so the last read misses nothing.
        if self._output_fd is None:
            return
        try:
            chunk = os.read(self._output_fd, _OUTPUT_LIMIT)
        except BlockingIOError:
            return
        if not chunk:
            self._close_output()
        self._output += chunk
        del self._output[:-_OUTPUT_LIMIT]
        self._log_output(chunk)

    def _log_output(self, chunk: bytes) -> None:
        for line in chunk.decode(errors="replace").splitlines()[: self._lines_to_log]:
            self._lines_to_log -= 1
            log.debug("%s: %s", self.name, printable(line, limit=LINE_LIMIT))
            if not self._lines_to_log:
                log.debug("%s: goes on; its further output is not logged", self.name)

    def _close_output(self) -> None:
        if self._output_fd is not None:
            self._loop.remove_reader(self._output_fd)
            os.close(self._output_fd)
            self._output_fd = None


def waits_more_than_it_runs(threads: Iterable[str]) -> bool:
    """Compare how long threads had a processor with how long they waited for one.

    :param threads: each one's ``schedstat``, which begins with both times; see the kernel's sched-stats.rst.
    """
    times = [[int(word) for word in thread.split()] for thread in threads]
    return sum(waited for _ran, waited, *_ in times) > sum(ran for ran, *_ in times)


@contextlib.contextmanager
def _no_huge_pages() -> Iterator[None]:
    """Deny huge pages to the programs that are started within a block, which inherit the setting."""
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


def _children(pid: int) -> list[int]:
    return [int(child) for children in _of_threads(pid, "children") for child in children.split()]


def _of_threads(pid: int, name: str) -> list[str]:
    """Read a file of each thread of a process, except of those that end meanwhile."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(path.read_text(encoding="ascii"))
    return found

"""Child processes that cannot outlive this one, cannot be missed when they die, and can say why they did."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
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

_OUTPUT_LIMIT = 64 * 1024
_CAUSE_LINES = 3
LINE_LIMIT = 400
"""Characters of a line that is shown."""

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
    """A supervised process: its end is an event, its last words are kept.

    Must be created on the main thread: the kernel ties the death signal to the thread that spawned the
    process. Nothing else in this program may reap children it did not start.

    :param name: what the process does; used in errors and in the ledger.
    :param pid: its process id. The process must not have been reaped.
    :param output: the read end of the pipe that its output goes to, or ``None`` if it has none of its own.
    """

    def __init__(self, name: str, pid: int, *, output: int | None = None) -> None:
        self.name = name
        self.pid = pid
        self.is_confined = False
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(pid)
        self._output_fd = output
        self._output = bytearray()
        self.workers: list[ChildProcess] = []
        """The processes this one forked, as far as ``adopt_workers`` found them."""
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
    ) -> Self:
        """Start a program that the kernel kills when this thread ends.

        If this thread ends within the millisecond before ``setpriv`` has asked for that, the program stays:
        whoever cleans up after a killed shim must still look for the processes it recorded.

        :param name: what the process does.
        :param argv: the program and its arguments.
        :param inherit: descriptors the program gets under the same numbers; it gets no others but 0 to 2.
        :param huge_pages: whether its memory may be of huge pages, if it asks for them.
        :param keeps_capabilities: whether a thread keeps its capabilities when it becomes another user.
        :param confinement: what it may have and do; what this process may, if it is ``None``.
        :raises NotImplementedError: as ``launch``.
        :raises OSError: if no process could be made. A program that cannot be executed is not an error
            here: the process ends at once with status 127 and says so in its output.
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
                confined = cls(name, pid, output=read_end)
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
                        # Onto itself: this is how posix_spawn clears close-on-exec, in the child alone.
                        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherit),
                    ],
                    # Signals from a terminal are for this process, which then ends the child in order.
                    setsid=True,
                    setsigmask=(),
                    setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
                )
        except (OSError, NotImplementedError):
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        return cls(name, pid, output=read_end)

    async def ended_well(self, *, timeout_s: float) -> bool:
        """Wait for a program that only has something to say, and kill one that takes too long.

        :param timeout_s: how long it may take, in seconds.
        :returns: whether it ended, with status 0.
        """
        await asyncio.wait([self.exited], timeout=timeout_s)
        self.kill()
        return (await self.exited).code == 0

    @property
    def is_starved(self) -> bool:
        """Whether the live process waited for a processor for longer than it had one, since it began."""
        return waits_more_than_it_runs(
            path.read_text(encoding="ascii") for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        )

    def adopt_workers(self) -> None:
        """Find the processes this one has forked by now, so that ``destroy`` ends them too."""
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
            # A parent that outlives its worker reaps it and then has nothing left to do.
            await asyncio.wait([self.exited], timeout=_REAPING_S)
        self.kill()
        await asyncio.wait([self.exited, *(worker.exited for worker in self.workers)])
        for worker in self.workers:
            worker.bury()

    def bury(self) -> None:
        """Reap a process that was another's child until that other one died. May be called repeatedly."""
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
        """Return the last part of what the process wrote to its standard output and error."""
        return self._output.decode(errors="replace")

    def last_words(self) -> str:
        """Return the last lines of the output that may tell why it ended, joined into one."""
        lines = last_words(self.output(), self.exited.result() if self.exited.done() else None)
        return "; ".join(printable(line, limit=LINE_LIMIT) for line in lines[-_CAUSE_LINES:])

    def obituary(self) -> str:
        """Say in one line how the process ended; it must have."""
        words = self.last_words()
        return f"{self.name} {self.exited.result()}" + (f": {words}" if words else "")

    def _reap(self) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            # Another process's child: dead, and its status is not ours to know. If its parent dies without
            # having reaped it, it may become ours; so the descriptor is kept for bury().
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
        # One read at a time: a program that floods its output must not keep the event loop. The limit is also
        # what a pipe holds, so the read at the end misses nothing.
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

    def _close_output(self) -> None:
        if self._output_fd is not None:
            self._loop.remove_reader(self._output_fd)
            os.close(self._output_fd)
            self._output_fd = None


def waits_more_than_it_runs(threads: Iterable[str]) -> bool:
    """Compare the times that threads had a processor and waited for one.

    :param threads: each one's ``schedstat``, which begins with both, see the kernel's sched-stats.rst.
    """
    times = [[int(word) for word in thread.split()] for thread in threads]
    return sum(waited for _ran, waited, *_ in times) > sum(ran for ran, *_ in times)


@contextlib.contextmanager
def _no_huge_pages() -> Iterator[None]:
    """Have what is started for the length of a block do without huge pages: programs inherit it."""
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in task.read_text().split()]
    return found

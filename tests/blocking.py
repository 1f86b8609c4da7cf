"""Finds calls that block an event loop, and with it everything that the loop serves.

It finds two kinds. The first is a callback that was blocked for long: the time in which its thread neither
computed nor waited for a processor was spent in a blocking call. The second is a call from this project's
code that may block forever (on a lock, a name server, a FIFO or a clock), even if it returned at once.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import stat
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

TOP = Path(__file__).resolve().parents[1]
OURS = tuple(f"{TOP / package}/" for package in ("shim", "hypervisor", "guest", "tests"))
TESTS = f"{TOP / 'tests'}/"
LONGEST_S = 0.5
_BASELINE_S = 0.02
_NANO = 1e-9
_ALLOWED = {
    ("shim/host/file_lock.py", "take"),  # for 0.1 s at most, and only while another process writes
}
_ENDLESS = {"socket.getaddrinfo", "socket.gethostbyname", "os.system"}


def _waited_for_a_processor() -> float:
    """Return for how long the threads of this process have waited for a processor, in seconds."""
    waited = 0
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 (called often)
        try:
            with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:  # noqa: PTH123 (called often)
                waited += int(file.read().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
    return waited * _NANO


class Detector:
    """Records what has blocked the event loops of this process.

    The clock alone cannot tell: on a loaded machine, a callback that only computes takes long, too. So two
    times are subtracted: what the process computed meanwhile, and what its threads waited for processors.
    A callback that had to read pages from a disk is ignored. What remains is a lower bound.

    :param longest_s: how long a callback may be blocked, in seconds.
    """

    def __init__(self, *, longest_s: float = LONGEST_S) -> None:
        self.found: list[str] = []
        self._longest_s = longest_s
        self._baseline = (0.0, 0.0)

    def watch(self, handle: Any, run: Any) -> None:
        """Run a callback, and record it if it was blocked."""
        start, computed = time.perf_counter(), time.process_time()
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        if start - self._baseline[0] > _BASELINE_S:
            self._baseline = (start, _waited_for_a_processor())
        run(handle)
        held_s = time.perf_counter() - start
        if held_s <= self._longest_s:
            return
        blocked_s = (
            held_s - (time.process_time() - computed) - (_waited_for_a_processor() - self._baseline[1])
        )
        is_from_disk = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt > faults
        if blocked_s > self._longest_s and not is_from_disk:
            self.found.append(f"a callback was blocked for {blocked_s:.3f} s: {handle!r}")

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Record a call from this project's code that may block forever, if a loop runs in this thread."""
        if asyncio._get_running_loop() is None or not _may_block(event, arguments):
            return
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        if frame is not None and not frame.f_code.co_filename.startswith(TESTS):
            path, function = str(Path(frame.f_code.co_filename).relative_to(TOP)), frame.f_code.co_name
            if (path, function) not in _ALLOWED:
                self.found.append(f"{event} may block: {path}:{frame.f_lineno}: {function}")


def _may_block(event: str, arguments: tuple[Any, ...]) -> bool:
    if event in {"fcntl.flock", "fcntl.lockf"}:
        operation = arguments[1]
        return not operation & (fcntl.LOCK_NB | fcntl.LOCK_UN)
    if event == "open":
        path, _, flags = arguments
        return (
            not flags & (os.O_NONBLOCK | os.O_PATH) and flags & os.O_ACCMODE != os.O_RDWR and _is_fifo(path)
        )
    return event in _ENDLESS or event == "time.sleep"


def _is_fifo(path: Any) -> bool:
    try:
        return isinstance(path, str | bytes) and stat.S_ISFIFO(os.stat(path).st_mode)  # noqa: PTH116
    except (OSError, ValueError):
        return False


_listening: list[Detector] = []
_RUN, _SLEEP = asyncio.Handle._run, time.sleep


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening:
        _listening[-1].hear(event, arguments)


@contextmanager
def detected(detector: Detector) -> Iterator[Detector]:
    """Let a detector watch every event loop of this process for blocking calls."""
    before = asyncio.Handle._run, time.sleep

    def replace(run: Any, sleep: Any) -> None:
        vars(time)["sleep"] = sleep
        setattr(asyncio.Handle, "_run", run)  # noqa: B010 (a loop runs all its callbacks by this method)

    def watched(handle: Any) -> None:
        detector.watch(handle, _RUN)

    def slept(seconds: float) -> None:  # older interpreters raise no audit event for it
        detector.hear("time.sleep", (seconds,))
        _SLEEP(seconds)

    if not hasattr(_audit, "installed"):
        sys.addaudithook(_audit)
        vars(_audit)["installed"] = True
    _listening.append(detector)
    replace(watched, slept)
    try:
        yield detector
    finally:
        replace(*before)
        _listening.remove(detector)

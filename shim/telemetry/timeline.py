"""The phases of a sandbox's start: each process records its own in memory.

Each appends its records to one file beside the sandbox's state. All times are of CLOCK_MONOTONIC, which is
the same for all processes of a host. ``start`` imports this module, so it avoids slow imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: The lanes of phases; a container has its own lane, see :func:`container_lane`.
CONTAINERD, START, SHIM, MACHINE, KERNEL, AGENT = "containerd", "start", "shim", "machine", "kernel", "agent"
#: In the environment of containerd or of a container: draw the timeline when the start is over.
ENVIRONMENT_VARIABLE = "HAKO_TIMELINE"
NAME = "timeline"
_MOST = 500  # a pod may have endless containers in its life, but not in its start
_BIRTH = 21  # field of /proc/self/stat, counted from 0: proc(5)

_noted: list[tuple[str, str, float, float]] = []
_written = 0


def container_lane(container_id: str) -> str:
    """Name the lane of a container."""
    return f"container {container_id}"


def note(name: str, *, lane: str, began_s: float, ended_s: float) -> None:
    """Record a phase that has ended.

    :param name: the phase.
    :param lane: the lane of its process.
    :param began_s: when it began, in seconds of ``time.monotonic()``.
    :param ended_s: when it ended.
    """
    if _written + len(_noted) < _MOST:
        _noted.append((lane, name, began_s, ended_s))


def mark(name: str, *, lane: str) -> None:
    """Record this moment."""
    now_s = time.monotonic()
    note(name, lane=lane, began_s=now_s, ended_s=now_s)


@contextlib.contextmanager
def phase(name: str, *, lane: str) -> Iterator[None]:
    """Record a block as a phase, whether it succeeds or not."""
    began_s = time.monotonic()
    try:
        yield
    finally:
        note(name, lane=lane, began_s=began_s, ended_s=time.monotonic())


def durations() -> list[tuple[str, str, float]]:
    """List the phases that this process has recorded and not written yet.

    :returns: the lane, the name and the duration in seconds of each.
    """
    return [(lane, name, ended_s - began_s) for lane, name, began_s, ended_s in _noted if ended_s > began_s]


def born_at_s() -> float:
    """Find out when this process was forked.

    The kernel reports it in ticks of 10 ms. The processor time used so far is more precise, but does not
    include the time in which the process waited for a processor.
    """
    now_s, used_s = time.monotonic(), time.process_time()
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - now_s
    with open("/proc/self/stat", "rb") as file:
        # The first two fields end with the parenthesis.
        ticks = int(file.read().rpartition(b")")[2].split()[_BIRTH - 2])
    frequency = os.sysconf("SC_CLK_TCK")
    earliest_s = ticks / frequency - asleep_s
    return max(earliest_s, min(now_s - used_s, earliest_s + 1 / frequency))


def forget() -> None:
    """Forget what this process has recorded."""
    global _written  # noqa: PLW0603 - one timeline per process
    _noted.clear()
    _written = 0


def path_of(state_directory: str) -> str:
    """Name the file of a sandbox."""
    return os.path.join(state_directory, NAME)


def write(state_directory: str) -> None:
    """Append the records since the last call to the file of a sandbox.

    :param state_directory: the sandbox's state directory, which exists.
    :raises OSError: if the file cannot be written; the records are lost.
    """
    global _written  # noqa: PLW0603 - one timeline per process
    lines = "".join(json.dumps(entry) + "\n" for entry in _noted).encode()
    _written += len(_noted)
    _noted.clear()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path_of(state_directory), flags, 0o600)
    try:
        os.write(descriptor, lines)
    finally:
        os.close(descriptor)

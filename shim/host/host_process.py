"""Host processes by pid and start time, so that a process with a recycled pid is never touched."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time

from shim.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: The exit status of a process that SIGKILL ended, as shells and containerd count.
STATUS_KILLED = 128 + signal.SIGKILL

#: Of proc(5) ``stat``.
_STOPPED = {b"T", b"t"}
_EXITING = 0x4  # PF_EXITING of the kernel's sched.h, in the flags of stat
_UIDS = re.compile(rb"^Uid:(.*)$", re.MULTILINE)


class HostProcess(Record):
    """A process that was running when it was recorded."""

    pid: int
    #: Clock ticks between the boot of the host and the start of the process: field 22 of proc(5) ``stat``.
    start_time: int


def identify(pid: int) -> HostProcess:
    """Record a process that is running now.

    :param pid: its id.
    :returns: its identity.
    :raises ProcessLookupError: if there is none.
    """
    return HostProcess(pid=pid, start_time=int(_fields(pid)[19]))


def is_stopped(process: HostProcess) -> bool:
    """Tell whether a recorded process exists and is stopped, by a signal or by a debugger."""
    try:
        fields = _fields(process.pid)
    except ProcessLookupError:
        return False
    return fields[0] in _STOPPED and int(fields[19]) == process.start_time


def _fields(pid: int) -> list[bytes]:
    """Return the fields of proc(5) ``stat`` after the command name.

    :raises ProcessLookupError: if there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error
    # The command name, in parentheses, may hold spaces and parentheses itself.
    return stat[stat.rindex(b")") + 1 :].split()


def user_has_any(uid: int) -> bool:
    """Tell whether any process of this host runs as a user, or may become that user again.

    :param uid: the user's id.
    """
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/{pid}/status", "rb") as file,
        ):
            found = _UIDS.search(file.read())
            if found is not None and str(uid).encode() in found[1].split():
                return True
    return False


def pin(process: HostProcess) -> int | None:
    """Open a pidfd on a recorded process.

    :param process: the identity.
    :returns: a pidfd, or None if that process is gone, even if another one has its pid.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    # The pidfd pins the process that has the pid now; only then is its start time reliable.
    try:
        same = identify(process.pid) == process
    except ProcessLookupError:
        same = False
    if same:
        return pidfd
    os.close(pidfd)
    return None


def is_running(process: HostProcess) -> bool:
    """Tell whether a recorded process still runs; one that the kernel is ending does not.

    The kernel closes a killed process's sockets before its pidfd says that it has ended. A client that has
    lost its connection may ask in between.
    """
    try:
        fields = _fields(process.pid)
    except ProcessLookupError:
        return False
    return int(fields[19]) == process.start_time and not int(fields[6]) & _EXITING


def end(
    processes: Iterable[HostProcess], *, number: signal.Signals | None, timeout_s: float
) -> list[HostProcess]:
    """Signal processes, which need not be children, and wait until they have ended.

    :param processes: the identities, signalled in this order.
    :param number: the signal, or nothing to only wait.
    :param timeout_s: how long to wait for all of them together.
    :returns: those that are still running.
    """
    pinned = {}
    for process in processes:
        pidfd = pin(process)
        if pidfd is not None:
            pinned[pidfd] = process
        if pidfd is not None and number is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
    return [pinned[pidfd] for pidfd in _wait(list(pinned), timeout_s=timeout_s)]


def _wait(pidfds: list[int], *, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    left = list(pidfds)
    while left and (ready := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
        for pidfd, _ in ready:
            poll.unregister(pidfd)
            left.remove(pidfd)
    for pidfd in pidfds:
        os.close(pidfd)
    return left

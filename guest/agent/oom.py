"""Kills for memory: the kernel counts them for each cgroup, and the host asks for them one by one.

The kernel counts a kill before it sends the signal (mm/oom_kill.c), and marks the file as changed.
"""

from __future__ import annotations

import _thread
import os
import time

from guest.agent import cgroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ttrpc import Call

SETTLE_TIMEOUT_S = 2.0
"""How long the end of a process waits until the host has been told of a kill."""


class _Counter:
    """The kills of one container.

    :param container_id: its id.
    :param fd: its cgroup's ``memory.events``, owned from now on.
    """

    __slots__ = ("claimed", "container_id", "fd", "gates", "told")

    def __init__(self, container_id: str, fd: int) -> None:
        self.container_id = container_id
        self.fd = fd
        self.claimed = 0
        self.told = 0
        self.gates: list[_thread.LockType] = []

    def count(self) -> int:
        try:
            return cgroup.kills(self.fd)
        except OSError:
            return self.claimed  # the cgroup is gone

    def __del__(self) -> None:
        os.close(self.fd)


_lock = _thread.allocate_lock()
_counters: dict[str, _Counter] = {}
_changed_fd = -1
_asked = False


def watch(container_id: str, path: str) -> None:
    """Count the kills in a container from now on.

    :param container_id: its id.
    :param path: its cgroup; without a memory controller there is nothing to count.
    """
    try:
        counter = _Counter(container_id, cgroup.open_kills(path))
    except FileNotFoundError:
        return
    with _lock:
        _counters[container_id] = counter
        if _changed_fd >= 0:
            os.eventfd_write(_changed_fd, 1)


def forget(container_id: str) -> None:
    """Stop counting.

    :param container_id: the container.
    """
    with _lock:
        _counters.pop(container_id, None)


def next_kill(call: Call) -> str:
    """Wait for a kill that the host has not been told of; kills between two calls are not lost.

    :param call: the request being served.
    :returns: the container.
    :raises Cancelled: if the caller is gone.
    """
    global _asked, _changed_fd  # noqa: PLW0603  made by the first caller, for the life of the machine
    with _lock:
        if _changed_fd < 0:
            _changed_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        _asked = True
    while True:
        with _lock:
            counters = list(_counters.values())
            for counter in counters:
                count = counter.count()
                if count > counter.claimed:
                    counter.claimed = count
                    call.afterwards = lambda: _tell(counter, count)  # noqa: B023  the loop ends here
                    return counter.container_id
        if _changed_fd in call.wait(readable=(_changed_fd,), changed=[counter.fd for counter in counters]):
            _drain_changes()


def settle(container_id: str) -> None:
    """Delay the report of a process's end until the host has been told of earlier kills.

    If the host never asks for kills, there is no delay.

    :param container_id: the container the process was in.
    """
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while (left := deadline - time.monotonic()) > 0:
        with _lock:
            counter = _counters.get(container_id)
            if not _asked or counter is None or counter.told >= counter.count():
                return
            gate = _thread.allocate_lock()
            gate.acquire()
            counter.gates.append(gate)
            # A read of the count clears the change for all waiting calls: they share a descriptor.
            os.eventfd_write(_changed_fd, 1)
        gate.acquire(timeout=left)


def _tell(counter: _Counter, count: int) -> None:
    with _lock:
        counter.told = max(counter.told, count)
        gates, counter.gates = counter.gates, []
    for gate in gates:
        gate.release()


def _drain_changes() -> None:
    try:
        os.eventfd_read(_changed_fd)
    except BlockingIOError:
        return  # another call was faster

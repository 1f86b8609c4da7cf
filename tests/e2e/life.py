"""A container at an exact moment of its life, and the processes that can be killed at that moment."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import HAKO, new_id
from tests.e2e.containerd import CALL_TIMEOUT_S
from tests.e2e.tasks import Exits, Tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.conftest import Stack
    from tests.e2e.nursery import Process

MOMENT_S = CALL_TIMEOUT_S
"""Longer than a zygote may take, too, which gives way to all others while it imports everything."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.05
PROGRAMS = {
    "shim": "containerd-shim-hako-v2",
    "QEMU": "qemu-system-x86_64",
    "virtio-fs daemon": "virtiofsd",
    "vsock daemon": "vhost-device-vsock",
    "copier": "sealed_memory.py",
}


class Life:
    """The life of one container, and of a privileged one beside it in the machine if there is a door.

    :param stack: where it lives.
    :param place: a directory for FIFOs.
    """

    def __init__(self, stack: Stack, place: Path) -> None:
        self.id = new_id()
        self.exits = Exits()
        self._containerd = stack.containerd
        self._place = place
        self._door = -1
        self._door_id = ""
        self._log_start = stack.containerd.log.stat().st_size
        self.connect()

    def __enter__(self) -> Self:
        """Return the life; leaving the block ends it by force."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the remains of the containers."""
        self.tasks.__exit__()
        if self._door >= 0:
            os.close(self._door)
        self._containerd.revive()
        for name in filter(None, (self.id, self._door_id)):
            if name in self._containerd.containers():
                self._containerd.remove(name)

    def connect(self) -> None:
        """Connect to containerd, again if it was restarted."""
        self.tasks = Tasks(self._containerd.address)
        self.tasks.subscribe(self.exits)

    @property
    def all_ids(self) -> list[str]:
        """The containers of the machine."""
        return [name for name in (self._door_id, self.id) if name]

    def write_down(self, *options: str | Path) -> None:
        """Let containerd know the container: its image, its snapshot, its process."""
        joined = ["--annotation", f"io.containerd.runc.v2.group={self._door_id}"] if self._door_id else []
        self._record(self.id, "sleep", "1000", options=[*joined, *options])

    def open_door(self) -> None:
        """Start a privileged container in the same machine that makes its kernel panic when told to."""
        self._door_id = new_id()
        self._record(self._door_id, "sh", options=["--privileged"])
        streams = {name: self._place / f"{self._door_id}-{name}" for name in ("stdin", "stdout")}
        for path in streams.values():
            os.mkfifo(path)
        output = os.open(streams["stdout"], os.O_RDWR)  # so that it opens without a peer
        self._door = os.open(streams["stdin"], os.O_RDWR)
        try:
            self.tasks.begin_create(
                self._door_id, **{name: str(path) for name, path in streams.items()}
            ).result()
            self.tasks.call("Start", self._door_id)
            os.write(self._door, b"echo open\n")
            assert select.select([output], [], [], MOMENT_S)[0], "the privileged container is silent"
            assert os.read(output, 100) == b"open\n"
        finally:
            os.close(output)

    def do_as_root(self, command: str) -> None:
        """Have the privileged container's shell do something, which it must not wait for."""
        os.write(self._door, f"{command}\n".encode())

    def kill(self, victim: str) -> None:
        """Kill a process of the sandbox, now or as soon as it exists."""
        if victim == "guest":
            self.do_as_root("echo c > /proc/sysrq-trigger")
        elif victim == "containerd":
            self._containerd.stop(how=signal.SIGKILL)
        else:
            self.signal(victim, signal.SIGKILL)

    def signal(self, victim: str, number: signal.Signals) -> None:
        """Send a signal to a process of the sandbox, as soon as it exists."""
        os.kill(self.pid(victim), number)

    def pid(self, victim: str) -> int:
        """Return the id of a process of the sandbox, as soon as it exists."""
        found: Process = until(lambda: self._find(victim), what=f"the {victim} runs")
        return found.pid

    def processes(self, program: str) -> list[Process]:
        """Return the processes of a program below this containerd, oldest first."""
        running = (
            process
            for process in self._containerd.nursery.descendants()
            if program in process.command and "setpriv" not in process.command
        )
        return sorted(running, key=lambda process: process.start_time)

    def wait_for_log(self, pattern: str) -> None:
        """Wait for a line in containerd's log, which includes the shims' lines: containerd copies them.

        :param pattern: what occurs in the line.
        """
        until(lambda: re.search(pattern, self.log()), what=f"the log says {pattern!r}")

    def log(self) -> str:
        """Return what containerd and the shims have logged since this life began."""
        with self._containerd.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def wait_for_state(self, states: set[str], *, timeout_s: float) -> tuple[str, int]:
        """Wait for one of some states; return it and the exit status."""
        return self.wait_for_state_of(self.id, states, timeout_s=timeout_s)

    def wait_for_state_of(self, name: str, states: set[str], *, timeout_s: float) -> tuple[str, int]:
        """As :meth:`wait_for_state`, for one of the containers."""
        seen: list[tuple[str, int]] = []

        def reached() -> bool:
            seen.append(self.tasks.state(name))
            return seen[-1][0] in states

        until(reached, what=f"{name} is one of {states}", timeout_s=timeout_s)
        return seen[-1]

    def remove(self) -> None:
        """Delete every task and container as a user would, in any state.

        :raises AssertionError: if ``ctr`` cannot.
        """
        for name in reversed(self.all_ids):
            # A task whose shim has just died cannot be deleted until containerd has noticed.
            until(partial(self._delete_task, name), what=f"the task {name} is deleted")
            deleted = self._containerd.ctr("container", "delete", name)
            assert deleted.code == 0, deleted.stderr

    def _delete_task(self, name: str) -> bool:
        if self.tasks.state(name)[0] != "GONE":
            self._containerd.ctr("task", "delete", "--force", name)
        return self.tasks.state(name)[0] == "GONE"

    def _find(self, victim: str) -> Process | None:
        # A virtio-fs daemon has two processes, of which the younger serves; one that only prints its options
        # does not serve.
        found = [each for each in self.processes(PROGRAMS[victim]) if "--help" not in each.command]
        if victim == "shim":
            found = [each for each in found if " -state " in each.command]
            # A child of a shim has its command line until it runs its own program.
            pids = {each.pid for each in found}
            found = [each for each in found if each.parent not in pids]
        return found[-1] if found else None

    def _record(self, name: str, *command: str, options: list[str | Path]) -> None:
        made = self._containerd.ctr("container", "create", "--runtime", HAKO, *options, IMAGE, name, *command)
        assert made.code == 0, made.stderr


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Let processes stand still for a block, as on a host that has no time for them."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            until(partial(_stands_still, pid), what=f"process {pid} stands still")
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _stands_still(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    try:
        states = {each.read_text(errors="replace").rpartition(")")[2].split()[0] for each in threads}
    except (FileNotFoundError, ProcessLookupError):  # a thread has just ended
        return False
    return states == {"T"}


def until(condition: Callable[[], Any], *, what: str, timeout_s: float = MOMENT_S) -> Any:
    """Wait until a condition has a true value, and return it.

    It is asked less and less often, because each look at all processes takes time from what is waited for.

    :raises TimeoutError: if it has none in time.
    """
    deadline, pause_s = time.monotonic() + timeout_s, _SHORTEST_PAUSE_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, _LONGEST_PAUSE_S)
    return value

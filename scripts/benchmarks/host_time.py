"""The host's share: the processor time that a container costs outside its guest."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import threading
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.stage import MeasurementError
from tests.e2e.busybox import IMAGE
from tests.e2e.nursery import descendants, processes
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.benchmarks.stage import Stage
    from scripts.benchmarks.taskstats import Ended, EndedThreads
    from tests.e2e.containerd import Containerd

LOOK_S = patient(0.02)
GUEST = "guest"
"""The threads that run guests' instructions; they are left out."""

STARTING, ENDING = "until its output", "after it"
_BY_COMMAND = (
    ("memory_copy", "copier"),
    ("virtiofsd", "virtio-fs daemon"),
    ("vhost-device-vsock", "vsock daemon"),
    (" -state ", "shim"),
    ("-zygote", "zygote"),
    (" delete", "start and delete"),
    (" start", "start and delete"),
    ("containerd-shim", "shim"),
    ("/ctr ", "ctr"),
    ("/containerd ", "containerd"),
    ("runc", "runc"),
)
_BY_THREAD = (
    ("containerd-shim", "start and delete"),
    ("vhu-vsock", "vsock daemon"),
    ("vring_worker", "vsock daemon"),
    ("virtiofsd", "virtio-fs daemon"),
    ("runc", "runc"),
)
"""Roles by thread name, for processes that ended before their command line was read."""

_GUEST_THREADS = ("CPU ", "ALL CPUs/")
_MS = 1000
_LEAST_MS = 0.1


def role(command: str, thread: str) -> str:
    """Name the role of a thread.

    :param command: its process's command line, or empty if that was not read.
    :param thread: the thread's name.
    """
    if "qemu-system" in command or thread.startswith((*_GUEST_THREADS, "qemu-system", "vhost-")):
        if thread.startswith(_GUEST_THREADS):
            return GUEST
        return "QEMU's main thread" if thread.startswith("qemu-system") else "QEMU's other threads"
    named = [name for word, name in _BY_COMMAND if word in command]
    named += [name for word, name in _BY_THREAD if thread.startswith(word)]
    return next(iter(named), "others")


class Bill:
    """The time that this process's descendants, live or ended, have used since the bill was opened.

    :param ended: reports threads that end.
    :param harness: the pid of a descendant that does not count, although its own descendants do.
    """

    def __init__(self, ended: EndedThreads, *, harness: int) -> None:
        self._ended = ended
        self._harness = harness
        self._lock = threading.Lock()
        self._used_s: dict[int, float] = {}
        self._threads: dict[int, tuple[int, str]] = {}
        self._commands: dict[int, str] = {}
        list(ended.read())  # drop what ended before
        self.look()
        self._before_s = dict(self._used_s)

    def look(self) -> None:
        """Read the time that has been used so far."""
        with self._lock:
            for process in descendants(os.getpid()):
                if process.pid != self._harness:
                    self._commands[process.pid] = process.command
                    self._look_at(process.pid)
            for one in self._ended.read():
                if self._is_ours(one):
                    pid, _ = self._threads.get(one.pid, (one.pid, ""))
                    self._commands.setdefault(pid, "")
                    self._threads[one.pid] = (pid, one.name)
                    self._used_s[one.pid] = one.used_s

    def by_role(self) -> dict[str, float]:
        """Add up the time that was used since the bill was opened, in seconds."""
        sums: dict[str, float] = defaultdict(float)
        with self._lock:
            for thread, used_s in self._used_s.items():
                pid, name = self._threads[thread]
                sums[role(self._commands[pid], name)] += used_s - self._before_s.get(thread, 0.0)
        return sums

    def _look_at(self, pid: int) -> None:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):  # it has just ended; taskstats reports it
                name = (task / "comm").read_text(encoding="utf-8").strip()
                run_ns = int((task / "schedstat").read_text(encoding="ascii").split()[0])
                self._threads[int(task.name)] = (pid, name)
                self._used_s[int(task.name)] = run_ns / 1e9

    def _is_ours(self, one: Ended) -> bool:
        kernel, _, served = one.name.partition("-")  # vhost-1234
        if kernel == "vhost" and served.isdigit():
            return int(served) in self._commands
        return one.pid in self._threads or one.parent in {*self._commands, self._harness, os.getpid()}


def host_share(stage: Stage) -> Samples:
    """Add up the processor time of everything but the threads that run guests, for one ``ctr run --rm``.

    The container writes a word, reads one and ends. Its machine is cloned from a template, and its shim is
    forked by a zygote, whose next fork counts, too. Further lines give the medians by process and phase.
    Baseline: the same under runc.
    """
    shares: dict[str, list[float]] = defaultdict(list)

    def measure(daemon: Containerd) -> float:
        total_s = 0.0
        for key, used_s in _run(stage, daemon).items():
            shares[f"{'runc' if daemon is not stage.hako else 'Hako'}: {key}"].append(used_s)
            total_s += used_s
        return total_s * _MS

    stage.configure(template=True)
    stage.time_run()
    stage.wait_for_zygote()
    runc = stage.runc
    with stage.ended:
        samples = alternate(stage.rounds, value=lambda: measure(stage.hako), baseline=lambda: measure(runc))
    for key, used in sorted(shares.items()):
        # A role that is missing in a round counts as 0.
        middle_ms = statistics.median([*used, *[0.0] * (stage.rounds - len(used))]) * _MS
        if middle_ms > _LEAST_MS:
            print(f"  {key}: {middle_ms:.1f} ms", flush=True)
    return samples


def _run(stage: Stage, daemon: Containerd) -> Mapping[str, float]:
    bill = Bill(stage.ended, harness=processes()[stage.hako.pid].parent)
    name, over = stage.new_id(), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            bill.look()

    argv = daemon.run_argv(IMAGE, name, "sh", "-c", "echo up; read word", options=["--rm"])
    watcher = threading.Thread(target=watch)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as ctr:
        assert ctr.stdin is not None  # noqa: S101 - both requested above
        assert ctr.stdout is not None  # noqa: S101
        watcher.start()
        try:
            word = ctr.stdout.readline()
            bill.look()
            first = bill.by_role()
            ctr.stdin.write("end\n")
            ctr.stdin.flush()
            status = ctr.wait()
            stage.wait_until_gone()
        finally:
            over.set()
            watcher.join()
    if (word, status) != ("up\n", 0):
        raise MeasurementError(f"ctr run: {name}: wrote {word!r} and ended with {status}")
    bill.look()
    whole = bill.by_role()
    phases = {f"{key}, {STARTING}": used_s for key, used_s in first.items() if key != GUEST}
    for key, used_s in whole.items():
        if key != GUEST:
            phases[f"{key}, {ENDING}"] = used_s - first.get(key, 0.0)
    return phases

"""Measures what a pod costs its host beyond its guest: the numbers of ``hako install --kubernetes``."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.harness import Samples
from scripts.benchmarks.host_time import GUEST, role
from scripts.benchmarks.memory import SETTLE_S
from scripts.benchmarks.stage import CROWD_TIMEOUT_S, MeasurementError
from tests.e2e.nursery import descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scripts.benchmarks.stage import Stage
    from tests.e2e.nursery import Process

IDLE_S = 10.0
LOAD = """
mkdir /load
for round in 1 2 3; do
    dd if=/dev/zero of=/load/large bs=1M count=64 2>/dev/null
    head -c 8388608 /load/large
    i=0
    while [ $i -lt 300 ]; do echo word >/load/$i; i=$((i + 1)); done
    cat /load/* >/dev/null
    rm -r /load/*
done
"""
"""Writes and reads large and small files, and prints 8 MiB, three times."""

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ (\S{4}) \S+ \S+ \d+ *(.*)")
_GUEST_MEMORY = "/memfd:"
_KIB_PER_MIB = 1024
_UTIME, _STIME = 11, 12  # fields of proc(5) ``stat`` after the name, counted from 0


@dataclass(slots=True)
class Survey:
    """The costs of pods on their host.

    :param idle_mib: memory of a new clone.
    :param loaded_mib: memory of a booted machine after a load.
    :param code_mib: memory for the translated code of an emulated processor, at the same time; it is extra.
    :param idle_millicpus: processor time per second of a new clone.
    :param loaded_millicpus: the same of any machine during the load.
    """

    idle_mib: list[float] = field(default_factory=list)
    loaded_mib: list[float] = field(default_factory=list)
    code_mib: list[float] = field(default_factory=list)
    idle_millicpus: list[float] = field(default_factory=list)
    loaded_millicpus: list[float] = field(default_factory=list)


def overhead_mib(stage: Stage) -> Samples:
    """Add up the memory of shim, QEMU and daemons beyond the guest's: of a booted machine that did much.

    It has written and read large and small files in its root file system, and printed 24 MiB. Memory is the
    proportional set size without the guest's memory, plus page tables. The code of an emulated processor is
    left out: it takes up to 128 MiB more, and a further line has it.
    Baseline: an idle clone.
    """
    found = _survey(stage)
    print(f"  code of the emulated processor: {max(found.code_mib):.1f} MiB", flush=True)
    return Samples(value=tuple(found.loaded_mib), baseline=tuple(found.idle_mib))


def overhead_millicpus(stage: Stage) -> Samples:
    """Add up the processor time of everything but the threads that run the guest, which works hard meanwhile.

    It does what ``overhead_mib`` says. The unit is thousandths of a processor.
    Baseline: an idle clone.
    """
    found = _survey(stage)
    return Samples(value=tuple(found.loaded_millicpus), baseline=tuple(found.idle_millicpus))


@functools.lru_cache(maxsize=1)
def _survey(stage: Stage) -> Survey:
    """Measure clones and booted machines in turns, once for both metrics."""
    found = Survey()
    for _ in range(stage.rounds):
        for is_clone in (True, False):
            stage.configure(template=is_clone)
            with stage.container() as name:
                time.sleep(SETTLE_S)
                pod = list(_pod(stage))
                if is_clone:
                    found.idle_mib.append(sum(_host_memory_mib(each)[0] for each in pod))
                    found.idle_millicpus.append(_millicpus(pod, lambda: time.sleep(IDLE_S)))
                found.loaded_millicpus.append(_millicpus(pod, functools.partial(_work, stage, name)))
                if not is_clone:
                    memory = [_host_memory_mib(each) for each in _pod(stage)]
                    found.loaded_mib.append(sum(rest for rest, _ in memory))
                    found.code_mib.append(sum(code for _, code in memory))
    return found


def _pod(stage: Stage) -> Iterator[Process]:
    """List the processes of the only sandbox."""
    [shim] = [process for process in stage.processes().values() if " -state " in process.command]
    yield shim
    yield from descendants(shim.pid)


def _work(stage: Stage, name: str) -> None:
    argv = ("task", "exec", "--exec-id", "load", name, "sh", "-c", LOAD)
    done = stage.hako.ctr(*argv, timeout_s=CROWD_TIMEOUT_S)
    if done.code != 0:
        raise MeasurementError(f"load: {name}: {done.stderr.strip()}")


def _host_memory_mib(process: Process) -> tuple[float, float]:
    """Return a process's memory without its guest's, in MiB, and what it has of translated code."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    tables = re.search(r"VmPTE:\s+(\d+) kB", status)
    sizes = pss_by_mapping(Path(f"/proc/{process.pid}/smaps").read_text(encoding="utf-8"))
    rest = sizes[""] + (int(tables[1]) if tables else 0)
    return rest / _KIB_PER_MIB, sizes["code"] / _KIB_PER_MIB


def pss_by_mapping(smaps: str) -> dict[str, int]:
    """Add up proportional set sizes by kind: the ``guest``'s memory, translated ``code``, and all else.

    :param smaps: of proc(5).
    :returns: sizes in KiB; the rest has no name.
    """
    sizes = {"guest": 0, "code": 0, "": 0}
    kind = ""
    for line in smaps.splitlines():
        if begins := _MAPPING.fullmatch(line):
            access, name = begins.groups()
            is_code = access.startswith("rwx") and not name
            kind = "guest" if name.startswith(_GUEST_MEMORY) else "code" if is_code else ""
        elif line.startswith("Pss:"):
            sizes[kind] += int(line.split()[1])
    return sizes


def _millicpus(pod: list[Process], work: Callable[[], None]) -> float:
    before, began_s = _host_time_s(pod), time.monotonic()
    work()
    return 1000 * (_host_time_s(pod) - before) / (time.monotonic() - began_s)


def _host_time_s(pod: list[Process]) -> float:
    """Add up the processor time of a pod's processes, without the threads that run its guest."""
    ticks = 0
    for process in pod:
        ticks += _ticks(Path(f"/proc/{process.pid}/stat"))
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                name = (task / "comm").read_text(encoding="utf-8").strip()
                if role(process.command, name) == GUEST:
                    ticks -= _ticks(task / "stat")
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(stat: Path) -> int:
    fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[_UTIME]) + int(fields[_STIME])

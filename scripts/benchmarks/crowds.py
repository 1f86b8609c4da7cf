"""Measures many sandboxes at once."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.stage import CROWD_TIMEOUT_S, ZYGOTE, MeasurementError
from tests.e2e import census

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.benchmarks.stage import Stage

BURST = 30
CROWD = 100
CROWD_AT_ONCE = 10
RESIDENTS = 60
RESIDENT_MEMORY_MIB = 128
SETTLE_S = 10.0
"""How long to wait after a boot: a guest that still gives memory back is not idle."""
WINDOW_S = 10.0
PATIENCE = f"boot_timeout_s = {CROWD_TIMEOUT_S:.0f}\n"
_UTIME = 13  # fields of /proc/PID/stat, counted from 0: proc(5)
_STIME = 14


def burst_30(stage: Stage) -> Samples:
    """Time 30 ``ctr run -d`` at once, from the first spawn until the last has returned; none may fail.

    Machines are cloned from a template, and shims are forked by a zygote.
    Baseline: the time if they shared the processors without loss, which is 30 times the time of a single
    ``ctr run -d``, divided by the number of processors. Both are in seconds.
    """
    stage.configure(template=True, guest=PATIENCE)
    processors = os.cpu_count() or 1

    def burst() -> float:
        return timed_crowd(stage, BURST)

    def single() -> float:
        return timed_crowd(stage, 1) * BURST / processors

    single()
    stage.wait_for_zygote()
    return alternate(stage.rounds, value=burst, baseline=single)


def resident_60(stage: Stage) -> Samples:
    """Add up the processor time that 60 idle sandboxes of 128 MiB use, in per cent of one processor.

    Shims, QEMU and daemons count, over 10 seconds in each round. It fails if a sandbox does not answer State.
    Machines are cloned from a template. There is no baseline.
    """
    stage.configure(template=True, hypervisor=f"memory_mib = {RESIDENT_MEMORY_MIB}\n", guest=PATIENCE)
    with crowd(stage, RESIDENTS) as names:
        tasks = stage.hako.tasks()
        silent = [name for name in names if tasks.get(name, (0, ""))[1] != "RUNNING"]
        if silent:
            raise MeasurementError(f"State: {len(silent)} of {RESIDENTS} do not answer: {', '.join(silent)}")
        time.sleep(SETTLE_S)
        return Samples(value=tuple(_busy_percent(stage) for _ in range(stage.rounds)))


def crowd_100(stage: Stage) -> Samples:
    """Make, use and remove 100 sandboxes, 10 at once: the slowest ``ctr run -d``, over the median one.

    Machines of 128 MiB are cloned from a template. It fails if a sandbox does, or leaves anything behind.
    It is done only once, however many rounds there are.
    Baseline: all of them. Both in seconds.
    """
    stage.configure(template=True, hypervisor=f"memory_mib = {RESIDENT_MEMORY_MIB}\n", guest=PATIENCE)
    timed_crowd(stage, 1)
    stage.wait_for_zygote()
    before = _seen(stage)

    def live(name: str) -> float:
        began_s = time.perf_counter()
        stage.run_detached(stage.hako, name)
        took_s = time.perf_counter() - began_s
        said = stage.hako.exec(name, f"{name}-exec", "echo", name)
        if (said.code, said.stdout.strip()) != (0, name):
            raise MeasurementError(f"exec: {name}: said {said.stdout!r}: {said.stderr.strip()}")
        stage.hako.remove(name)
        return took_s

    names = [stage.new_id() for _ in range(CROWD)]
    with ThreadPoolExecutor(CROWD_AT_ONCE) as pool:
        lives = [pool.submit(live, name) for name in names]
    errors = [error for each in lives if (error := each.exception()) is not None]
    if errors:
        raise MeasurementError(f"{len(errors)} of {CROWD} sandboxes failed: {errors[0]}") from errors[0]
    stage.wait_until_gone()
    left = sorted(_seen(stage) - before)
    if left:
        raise MeasurementError(f"{len(left)} things are left: {'; '.join(left[:5])}")
    took_s = tuple(each.result() for each in lives)
    return Samples(value=(max(took_s),), baseline=took_s)


@contextlib.contextmanager
def crowd(stage: Stage, count: int, *, at_once: int | None = None) -> Iterator[list[str]]:
    """Keep some sleeping containers under Hako for a block.

    :param count: how many.
    :param at_once: how many are started and ended at once; by default, the number of processors.
    :raises MeasurementError: if one does not start.
    """
    names = [stage.new_id() for _ in range(count)]
    with ThreadPoolExecutor(at_once or os.cpu_count()) as pool:
        try:
            starts = [pool.submit(stage.run_detached, stage.hako, name) for name in names]
            for start in starts:
                start.result()
            yield names
        finally:
            list(pool.map(stage.hako.remove, names))
            stage.wait_until_gone()


def timed_crowd(stage: Stage, count: int) -> float:
    """Time some ``ctr run -d`` at once, from the first spawn until the last has returned, in seconds.

    :param count: how many.
    :raises MeasurementError: if one does not start.
    """
    began_s = time.perf_counter()
    with crowd(stage, count, at_once=count):
        return time.perf_counter() - began_s


def _seen(stage: Stage) -> frozenset[str]:
    """List what sandboxes may leave; the zygote's next fork is there before and after them."""
    everything = census.take(stage.hako, state_directory=stage.state_directory)
    return frozenset(line for line in everything if ZYGOTE not in line)


def _busy_percent(stage: Stage) -> float:
    before, began_s = _processor_time(stage), time.monotonic()
    time.sleep(WINDOW_S)
    used_s = _processor_time(stage) - before
    return 100 * used_s / (time.monotonic() - began_s)


def _processor_time(stage: Stage) -> float:
    """Add up the processor time of all processes that serve sandboxes, in seconds."""
    ticks = 0
    for pid in stage.processes():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        # The first two fields end with the parenthesis.
        ticks += int(fields[_UTIME - 2]) + int(fields[_STIME - 2])
    return ticks / os.sysconf("SC_CLK_TCK")

"""Measures starts on a host that is busy with other work."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

from scripts.benchmarks.crowds import PATIENCE, timed_crowd
from scripts.benchmarks.harness import Samples, alternate
from shim.machine.turns import DIRECTORY as TURNS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.benchmarks.stage import Stage

STARTS = 4
SPINNING = (0, 2, 8)
SPIN = "import os, sys\nparent = int(sys.argv[1])\nwhile os.getppid() == parent: pass"
"""A benchmark that is killed leaves nothing that spins."""


def busy_host(stage: Stage) -> Samples:
    """Time four ``ctr run -d`` at once beside 8 spinning processes, from the first spawn to the last return.

    The machines are cloned. Further lines give the medians beside 0, 2 and 8 spinning processes, cloned and
    booted, in seconds.
    Baseline: the same without turns (:mod:`shim.machine.turns`).
    """
    samples: dict[tuple[bool, int], Samples] = {}
    for template, spinning in itertools.product((False, True), SPINNING):
        stage.configure(template=template, guest=PATIENCE)
        timed_crowd(stage, 1)
        stage.wait_for_zygote()
        with _spinning(spinning):
            samples[template, spinning] = found = alternate(
                stage.rounds, value=lambda: timed_crowd(stage, STARTS), baseline=lambda: _without_turns(stage)
            )
        start = "cloned" if template else "booted"
        print(
            f"  {start} beside {spinning}: {statistics.median(found.value):.2f} s with turns, "
            f"{statistics.median(found.baseline):.2f} s without",
            flush=True,
        )
    return samples[True, max(SPINNING)]


def _without_turns(stage: Stage) -> float:
    """Time the starts while a file is in the place of the turns, so that machines start without one."""
    kept = TURNS.rename(TURNS.with_name("kept-turns")) if TURNS.exists() else None
    TURNS.touch()
    try:
        return timed_crowd(stage, STARTS)
    finally:
        TURNS.unlink()
        if kept is not None:
            kept.rename(TURNS)


@contextlib.contextmanager
def _spinning(count: int) -> Iterator[None]:
    """Keep processes that spin for a block; each has its own session, by which Linux divides processors."""
    argv = [sys.executable, "-c", SPIN, str(os.getpid())]
    spinning = [subprocess.Popen(argv, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()

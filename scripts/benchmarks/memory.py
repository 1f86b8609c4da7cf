"""Measures the memory of idle sandboxes."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.crowds import PATIENCE, crowd
from scripts.benchmarks.harness import Samples
from scripts.benchmarks.stage import MeasurementError
from tests.e2e.nursery import descendants
from tests.patience import patient

if TYPE_CHECKING:
    from scripts.benchmarks.stage import Stage

SANDBOXES = 10
MEMORY_MIB = 256
SETTLE_S = patient(10.0)
"""How long to wait: guests give freed pages back within seconds, and no event says when they are done."""
_KIB_PER_MIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The memory of each of some sandboxes, in MiB.

    :param shim_pss: proportional set sizes of the shims.
    :param shim_uss: unique set sizes of the shims.
    :param pod_pss: proportional set sizes of all processes that serve a sandbox.
    """

    shim_pss: tuple[float, ...] = ()
    shim_uss: tuple[float, ...] = ()
    pod_pss: tuple[float, ...] = ()

    def __add__(self, other: Survey) -> Survey:
        """Join the samples of two rounds."""
        return Survey(
            shim_pss=self.shim_pss + other.shim_pss,
            shim_uss=self.shim_uss + other.shim_uss,
            pod_pss=self.pod_pss + other.pod_pss,
        )


def shim_pss_mib(stage: Stage) -> Samples:
    """Read the proportional set size of each shim of 10 idle sandboxes at once, forked by a zygote.

    The zygote's own share of the memory does not count, because it serves no sandbox.
    Baseline: the same with ``zygote = false`` and ``template = "off"``.
    """
    on, off = _surveys(stage)
    return Samples(value=on.shim_pss, baseline=off.shim_pss)


def shim_uss_mib(stage: Stage) -> Samples:
    """Read the private memory of each shim of 10 idle sandboxes, forked by a zygote.

    Baseline: the same with ``zygote = false`` and ``template = "off"``.
    """
    on, off = _surveys(stage)
    return Samples(value=on.shim_uss, baseline=off.shim_uss)


def pod_pss_mib(stage: Stage) -> Samples:
    """Add up the proportional set sizes of shim, QEMU and daemons, for each of 10 idle 256 MiB sandboxes.

    Machines are cloned from a template, and shims are forked by a zygote.
    Baseline: the same with ``zygote = false`` and ``template = "off"``.
    """
    on, off = _surveys(stage)
    return Samples(value=on.pod_pss, baseline=off.pod_pss)


@functools.lru_cache(maxsize=1)
def _surveys(stage: Stage) -> tuple[Survey, Survey]:
    """Measure sandboxes with zygote and template on and off in turns, once for all metrics."""
    found = {True: Survey(), False: Survey()}
    for _ in range(stage.rounds):
        for light in found:
            found[light] += _survey(stage, light=light)
    return found[True], found[False]


def _survey(stage: Stage, *, light: bool) -> Survey:
    stage.configure(zygote=light, template=light, hypervisor=f"memory_mib = {MEMORY_MIB}\n", guest=PATIENCE)
    if light:
        with stage.container():
            stage.wait_for_zygote()
    with crowd(stage, SANDBOXES):
        time.sleep(SETTLE_S)
        shims = [pid for pid, process in stage.processes().items() if " -state " in process.command]
        pods = [[shim, *(process.pid for process in descendants(shim))] for shim in shims]
        return Survey(
            shim_pss=tuple(pss_mib(shim) for shim in shims),
            shim_uss=tuple(mib_of(shim, "Private_Clean") + mib_of(shim, "Private_Dirty") for shim in shims),
            pod_pss=tuple(sum(pss_mib(pid) for pid in pod) for pod in pods),
        )


def pss_mib(pid: int) -> float:
    """Read the proportional set size of a process, in MiB.

    :param pid: its id.
    :raises MeasurementError: if the kernel does not tell.
    """
    return mib_of(pid, "Pss")


def mib_of(pid: int, field: str) -> float:
    """Read a size of a process's memory, in MiB.

    :param pid: its id.
    :param field: of ``smaps_rollup``, see proc(5).
    :raises MeasurementError: if the kernel does not tell.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) / _KIB_PER_MIB
    raise MeasurementError(f"smaps_rollup of {pid}: no {field}; a newer kernel is needed")

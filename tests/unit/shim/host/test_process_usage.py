"""A process's usage is read from the kernel's counters."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.host import process_usage
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_process_is_measured() -> None:
    used = process_usage.measure(os.getpid())
    own = resource.getrusage(resource.RUSAGE_SELF)

    assert 0 < used.memory_bytes <= used.resident_bytes
    assert used.cpu_s == pytest.approx(own.ru_utime + own.ru_stime, abs=0.5)


def threads_now() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def measured_between_threads() -> tuple[process_usage.ProcessDetails, int] | None:
    """Measure this process, unless one of its threads begins or ends meanwhile; some are not Python's."""
    before, found, after = threads_now(), process_usage.measure_in_detail(os.getpid()), threads_now()
    return (found, len(after)) if before == after else None


def test_a_process_is_measured_in_detail() -> None:
    measured = until(measured_between_threads)
    assert measured is not None
    found, threads = measured

    assert 0 < found.usage.memory_bytes <= found.usage.resident_bytes
    assert found.threads == threads
    assert found.descriptors >= 3
    assert found.status["vmrss"] == pytest.approx(found.usage.resident_bytes, rel=0.2)
    assert found.stat["utime"] > 0
    assert found.io["rchar"] > 0


@pytest.mark.parametrize("measure", [process_usage.measure, process_usage.measure_in_detail])
def test_a_process_that_is_gone_is_not_measured(measure: Callable[[int], object]) -> None:
    pid = os.posix_spawnp("true", ["true"], {"PATH": "/bin"})
    os.waitpid(pid, 0)

    with pytest.raises(ProcessLookupError):
        measure(pid)

"""What a process uses is measured as the kernel counts it."""

from __future__ import annotations

import os
import resource

import pytest

from shim.host import process_usage


def test_a_process_is_measured() -> None:
    used = process_usage.measure(os.getpid())
    own = resource.getrusage(resource.RUSAGE_SELF)

    assert 0 < used.memory_bytes <= used.resident_bytes
    assert used.cpu_s == pytest.approx(own.ru_utime + own.ru_stime, abs=0.5)


def test_a_process_that_is_gone_is_not_measured() -> None:
    pid = os.posix_spawnp("true", ["true"], {"PATH": "/bin"})
    os.waitpid(pid, 0)

    with pytest.raises(ProcessLookupError):
        process_usage.measure(pid)

"""A container's clock is the host's."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE, PYTHON, PYTHON_OPTIONS
from tests.e2e.by_hand import ByHand
from tests.e2e.conftest import new_id
from tests.e2e.life import stopped, until
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Stack

EXCHANGES = 25
ERROR_NS, FIRST_ERROR_NS = 5_000_000, 500_000_000
EXACT_S = patient(20.0)  # less than the minute after which the shim compares clocks in any case
HOUR_S = 3600
CLOCK = "import sys, time\nfor _ in sys.stdin: print(time.time_ns(), flush=True)"


def ahead(ask: Callable[[], int], exchanges: int = EXCHANGES) -> tuple[int, int]:
    """Find the bounds of how far a clock is ahead of the host's, in nanoseconds.

    :param ask: reads the clock: at some moment between its call and its return.
    """
    least, most = -(1 << 62), 1 << 62
    for _ in range(exchanges):
        before = time.time_ns()
        read = ask()
        least, most = max(least, read - time.time_ns()), min(most, read - before)
    return least, most


def is_right(bounds: tuple[int, int], *, error_ns: int = ERROR_NS) -> bool:
    """Tell whether a clock may be ahead by no more than an error, or behind."""
    least, most = bounds
    return least <= error_ns and most >= -error_ns


def test_a_container_starts_with_the_hosts_time(either_stack: Stack) -> None:
    containerd, name = either_stack.containerd, new_id()
    argv = containerd.run_argv(IMAGE, name, *PYTHON, CLOCK, options=["--rm", *PYTHON_OPTIONS])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask() -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("?\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        try:
            assert is_right(ahead(ask, exchanges=1), error_ns=FIRST_ERROR_NS)
            # Where the host is busy, the shim cannot be sure at first, and compares the clocks again.
            until(lambda: is_right(ahead(ask)), what="the clock is exact", timeout_s=EXACT_S)
        finally:
            process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
            process.wait()


@pytest.mark.hako
def test_a_clock_that_fell_behind_while_qemu_was_stopped_is_put_right(
    one_stack: Stack, tmp_path: Path
) -> None:
    with ByHand(one_stack, tmp_path, capabilities=["CAP_SYS_TIME"]) as box:

        def behind_s() -> float:
            return time.time() - int(box.output("date", "+%s"))

        def set_back() -> bool:
            # Where the host is busy, the shim still compares the clocks every half second.
            box.output("date", "-s", f"@{int(time.time()) - HOUR_S}")
            return behind_s() >= HOUR_S

        until(set_back, what="the clock is an hour behind")
        qemu = box.call("State").pid
        with stopped(qemu):
            pass
        until(lambda: behind_s() < HOUR_S / 2, what="the clock is right")

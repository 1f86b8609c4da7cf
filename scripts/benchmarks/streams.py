"""Measures how fast output travels."""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from scripts.benchmarks import inside
from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.sandbox import HAKO, running
from scripts.benchmarks.stage import MeasurementError

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.benchmarks.stage import Stage

MIB = 1 << 20
SIZE_MIB = 256


def stdout_over_channel(stage: Stage) -> Samples:
    """Send 256 MiB from a process in a container to the reader of its FIFO; higher is better.

    The time runs from the request that starts the process to the end of the stream.
    Baseline: the same bytes over the bare channel, from a program beside the agent that writes to a vsock
    port, to a reader of the channel's socket on the host. Both programs read /dev/zero in blocks of the same
    size.
    """
    inside.configure(stage)
    numbers = itertools.count(1)
    with running(stage, HAKO) as sandbox, ThreadPoolExecutor(1) as pool:

        def through_the_shim() -> float:
            exec_id = f"output-{next(numbers)}"
            fifo = stage.home / exec_id
            os.mkfifo(fifo, 0o700)
            began_s = time.perf_counter()
            read = pool.submit(_read, fifo)
            # Not head: BusyBox's head copies byte by byte, and would dominate the measurement.
            blocks = f"count={SIZE_MIB * MIB // inside.BLOCK_BYTES}"
            sandbox.execute(exec_id, "dd", "if=/dev/zero", f"bs={inside.BLOCK_BYTES}", blocks, stdout=fifo)
            size = read.result()
            took_s = time.perf_counter() - began_s
            sandbox.finish(exec_id)
            if size != SIZE_MIB * MIB:
                raise MeasurementError(f"stdout: {size} bytes arrived, not {SIZE_MIB * MIB}")
            return SIZE_MIB / took_s

        def through_the_channel() -> float:
            began_s = time.perf_counter()
            inside.receive(sandbox.vsock_socket(), SIZE_MIB * MIB)
            return SIZE_MIB / (time.perf_counter() - began_s)

        return alternate(stage.rounds, value=through_the_shim, baseline=through_the_channel)


def _read(fifo: Path) -> int:
    size, buffer = 0, bytearray(MIB)
    with fifo.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
    return size

"""Measures how fast the streams of a process travel."""

from __future__ import annotations

import contextlib
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
    from collections.abc import Callable
    from pathlib import Path

    from scripts.benchmarks.stage import Stage

MIB = 1 << 20
SIZE_MIB = 256
TRIPS = 500


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

        return alternate(
            stage.rounds,
            value=through_the_shim,
            baseline=lambda: _rate(SIZE_MIB, lambda: inside.receive(sandbox.vsock_socket(), SIZE_MIB * MIB)),
        )


def stdin_over_channel(stage: Stage) -> Samples:
    """Send 256 MiB from the writer of a FIFO to a process in a container; higher is better.

    From the request that starts the process to its end.
    Baseline: the same bytes over the bare channel, to a program beside the agent that reads them from a vsock
    port, from a writer to the socket that the channel has on the host. Both read blocks of one size.
    """
    inside.configure(stage)
    numbers = itertools.count(1)
    with running(stage, HAKO) as sandbox, ThreadPoolExecutor(1) as pool:

        def through_the_shim() -> float:
            exec_id = f"input-{next(numbers)}"
            fifo = stage.home / exec_id
            os.mkfifo(fifo, 0o700)
            began_s = time.perf_counter()
            written = pool.submit(_write, fifo)
            sandbox.execute(exec_id, "dd", "of=/dev/null", f"bs={inside.BLOCK_BYTES}", stdin=fifo)
            written.result()
            sandbox.call("CloseIO", exec_id=exec_id, stdin=True)
            sandbox.call("Wait", exec_id=exec_id)
            took_s = time.perf_counter() - began_s
            sandbox.finish(exec_id)
            return SIZE_MIB / took_s

        return alternate(
            stage.rounds,
            value=through_the_shim,
            baseline=lambda: _rate(SIZE_MIB, lambda: inside.send(sandbox.vsock_socket(), SIZE_MIB * MIB)),
        )


def exec_trips(stage: Stage) -> Samples:
    """Send a byte to ``cat`` in a container and wait until it comes back, as trips/s; higher is better.

    The process was started before. Baseline: a byte over the bare channel and back.
    """
    inside.configure(stage)
    stdin, stdout = stage.home / "trips-in", stage.home / "trips-out"
    for fifo in (stdin, stdout):
        os.mkfifo(fifo, 0o700)
    with running(stage, HAKO) as sandbox, contextlib.ExitStack() as stack:
        heard = os.open(stdout, os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, heard)
        os.set_blocking(heard, True)
        said = os.open(stdin, os.O_RDWR)
        stack.callback(os.close, said)
        sandbox.execute("trips", "cat", stdin=stdin, stdout=stdout)

        def through_the_shim() -> None:
            for _ in range(TRIPS):
                os.write(said, b"x")
                os.read(heard, 1)

        return alternate(
            stage.rounds,
            value=lambda: _rate(TRIPS, through_the_shim),
            baseline=lambda: _rate(TRIPS, lambda: inside.echo(sandbox.vsock_socket(), TRIPS)),
        )


def _rate(amount: int, work: Callable[[], None]) -> float:
    """Time some work; return how much of it is done in a second."""
    began_s = time.perf_counter()
    work()
    return amount / (time.perf_counter() - began_s)


def _write(fifo: Path) -> None:
    block = bytes(MIB)
    with fifo.open("wb", buffering=0) as file:
        for _ in range(SIZE_MIB):
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]


def _read(fifo: Path) -> int:
    size, buffer = 0, bytearray(MIB)
    with fifo.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
    return size

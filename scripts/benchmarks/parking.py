"""Measures what a parked sandbox holds, and how long it takes to wake."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from proto.hako import management_pb2
from scripts.benchmarks.crowds import crowd
from scripts.benchmarks.harness import Samples
from scripts.benchmarks.memory import MEMORY_MIB, SANDBOXES, SETTLE_S, mib_of
from scripts.benchmarks.sandbox import HAKO, Sandbox
from shim.commands import shims
from tests.e2e.nursery import descendants

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

    from scripts.benchmarks.stage import Stage
    from shim.host.state_directory import StartRecord

CALL_TIMEOUT_S = 120.0
MIB = 1 << 20
BLOCK_BYTES = 512  # the unit of st_blocks: stat(2)


def parked_mib(stage: Stage) -> Samples:
    """Add up what each of 10 parked 256 MiB sandboxes holds: its processes and its guest's memory.

    Baseline: the same sandboxes before. Shims are forked by a zygote, machines cloned from a template.
    """
    _prepare(stage)
    value: list[float] = []
    baseline: list[float] = []
    for _ in range(stage.rounds):
        with crowd(stage, SANDBOXES):
            time.sleep(SETTLE_S)
            baseline += _held_mib(stage)
            for record in shims.records(str(stage.state_directory)):
                _ask(stage, record, "Park", management_pb2.ParkRequest(), management_pb2.ParkResponse)
            value += _held_mib(stage)
    return Samples(value=tuple(value), baseline=tuple(baseline))


def wake_over_start(stage: Stage) -> Samples:
    """Time ``Unpark``, which answers once the container runs again.

    Baseline: ``start``, Create and Start of the same sandbox from a template.
    """
    _prepare(stage)
    value, baseline = [], []
    for _ in range(stage.rounds):
        with Sandbox(stage, HAKO) as sandbox:
            began_s = time.perf_counter()
            sandbox.start()
            sandbox.create()
            baseline.append(time.perf_counter() - began_s)
            time.sleep(SETTLE_S)
            [record] = shims.records(str(stage.state_directory))
            _ask(stage, record, "Park", management_pb2.ParkRequest(), management_pb2.ParkResponse)
            began_s = time.perf_counter()
            _ask(stage, record, "Unpark", management_pb2.UnparkRequest(), management_pb2.UnparkResponse)
            value.append(time.perf_counter() - began_s)
    return Samples(value=tuple(value), baseline=tuple(baseline))


def _prepare(stage: Stage) -> None:
    stage.configure(
        template=True, hypervisor=f'memory_mib = {MEMORY_MIB}\npark_dir = "{stage.home}/parked"\n'
    )
    with stage.container():
        stage.wait_for_zygote()


def _ask(stage: Stage, record: StartRecord, method: str, request: Message, reply: type[Message]) -> None:
    stage.runner.run(shims.ask(record, method, request, reply, timeout_s=CALL_TIMEOUT_S))


def _held_mib(stage: Stage) -> list[float]:
    shims_ = [pid for pid, process in stage.processes().items() if " -state " in process.command]
    return [_of_sandbox([shim, *(process.pid for process in descendants(shim))]) for shim in shims_]


def _of_sandbox(processes: Iterable[int]) -> float:
    """Add up what processes hold, and the memory of their guest, although none may map it."""
    private, memories = 0.0, {}
    for pid in processes:
        private += mib_of(pid, "Pss") - mib_of(pid, "Pss_Shmem")
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if str(descriptor.readlink()).startswith("/memfd:"):
                status = descriptor.stat()
                memories[status.st_ino] = status.st_blocks * BLOCK_BYTES
    return private + sum(memories.values()) / MIB

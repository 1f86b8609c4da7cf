"""QEMU's thread ids are checked, so that it cannot harm another process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from typing import TYPE_CHECKING, cast

import pytest

from hypervisor import ResizeError
from hypervisor.vcpus import Vcpus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.qmp import QmpSession


class Qemu:
    """A QEMU that reports a chosen thread for each of its virtual CPUs."""

    def __init__(self, *threads: object) -> None:
        self._threads = threads

    async def ask(self, _kind: type, command: str, **_: object) -> object:
        assert command == "query-cpus-fast"
        return [{"cpu-index": index, "thread-id": thread} for index, thread in enumerate(self._threads)]


def vcpus(*threads: object) -> Vcpus:
    return Vcpus(cast("QmpSession", Qemu(*threads)), pid=os.getpid(), boot=1, most=1, emulated=True)


@pytest.fixture
def stranger() -> Iterator[int]:
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        yield process.pid
        process.kill()


async def test_a_thread_of_another_process_is_not_moved(stranger: int) -> None:
    before = os.sched_getaffinity(stranger)

    with pytest.raises(ResizeError, match=f"thread {stranger} is not one of QEMU's"):
        await vcpus(stranger).pin(frozenset({min(before)}))

    assert os.sched_getaffinity(stranger) == before


@pytest.mark.parametrize("thread", ["..", -1, None, "1/../.."])
async def test_a_malformed_thread_id_is_refused(thread: int | str | None) -> None:
    with pytest.raises(ResizeError, match="is not one of QEMU's"):
        await vcpus(thread).pin(frozenset({0}))


async def test_a_thread_that_runs_all_virtual_cpus_gets_all_processors() -> None:
    thread = threading.get_native_id()
    before = os.sched_getaffinity(thread)
    try:
        await vcpus(thread, thread).pin(frozenset(before))
        assert os.sched_getaffinity(thread) == before
        await vcpus(thread, thread).pin(frozenset({min(before)}))
        assert os.sched_getaffinity(thread) == {min(before)}
    finally:
        os.sched_setaffinity(thread, before)


async def test_the_state_of_another_process_is_not_shown(stranger: int) -> None:
    assert await vcpus(stranger).states() == ""
    assert "vCPU 0" in await vcpus(os.getpid()).states()


@contextlib.contextmanager
def threads_that_end() -> Iterator[None]:
    """Let this process start threads for a block that end at once, as QEMU does for its blocking work."""
    over = threading.Event()

    def start_threads() -> None:
        while not over.is_set():
            short = threading.Thread(target=int)
            short.start()
            short.join()

    starting = threading.Thread(target=start_threads)
    starting.start()
    try:
        yield
    finally:
        over.set()
        starting.join()


async def test_a_search_among_threads_survives_the_end_of_some(stranger: int) -> None:
    with threads_that_end():
        for _ in range(300):
            with pytest.raises(ResizeError, match="is not one of QEMU's"):
                await vcpus(stranger).pin(frozenset({0}))

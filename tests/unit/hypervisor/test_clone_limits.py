"""On a busy host, a clone waits for a slow step, but not for a stalled one."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from hypervisor import TemplateLateError, cloning
from hypervisor.template import TemplateDescription
from hypervisor.vcpus import thread_state

if TYPE_CHECKING:
    from collections.abc import Iterator


MIB = 1 << 20
SAVED = TemplateDescription(
    qemu_version="",
    memory_bytes=64 * MIB,
    data_bytes=32 * MIB,
    memory_written_ns=0,
    state_bytes=0,
    state_sha256="",
    virtiofsd=[],
    virtiofsd_dialect="",
)


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    yield fd
    os.close(fd)


async def test_a_copy_that_progresses_may_take_any_time(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def copy_meanwhile(seconds: float) -> None:
        if len(waits) < 4:
            os.pwrite(memory, b"x" * MIB, len(waits) * MIB)
        waits.append(seconds)

    monkeypatch.setattr(cloning, "asyncio", SimpleNamespace(sleep=copy_meanwhile))
    with pytest.raises(TemplateLateError, match=r"/t/memory: its copy stands still at 4 of 32 MiB"):
        await cloning._watch_copy(Path("/t"), memory, SAVED, stall_s=7)
    assert waits == [7] * 5


async def test_the_error_names_the_step_at_which_qemu_hangs() -> None:
    with pytest.raises(TemplateLateError, match=r"/t: its state was not loaded within 0\.01 s"):
        async with cloning._limited(Path("/t"), "its state was not loaded", step_s=0.01):
            await asyncio.Event().wait()


def test_a_virtual_cpus_thread_is_described() -> None:
    times = r"\(ran for \d+\.\d s, waited \d+\.\d s for a processor\)"
    assert re.fullmatch(f"runs {times}", thread_state(threading.get_native_id()))
    with pytest.raises(OSError, match="No such file"):
        thread_state(1 << 22)

"""What the detector of blocking calls finds, and what it allows."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.blocking import TOP, Detector, detected

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONGEST_S = 0.05
CALLS = {
    "fcntl.flock": "import fcntl; fcntl.flock(file, fcntl.LOCK_EX)",
    "open": "open(fifo, 'rb').close()",
    "socket.getaddrinfo": "import socket; socket.getaddrinfo('127.0.0.1', 1)",
    "time.sleep": "import time; time.sleep(0)",
}
HARMLESS = {
    "lock": "import fcntl; fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "file": "open(file.name, 'rb').close()",
    "FIFO": "import os; os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))",
}


@pytest.fixture
def detector() -> Iterator[Detector]:
    with detected(Detector(longest_s=LONGEST_S)) as opened:
        yield opened


def run(source: str, tmp_path: Path, *, place: str) -> None:
    """Run a program as if it were a file of the tree."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    other_end = os.open(fifo, os.O_RDWR)
    program = compile(source, str(TOP / place), "exec")
    with (tmp_path / "file").open("wb") as file:
        exec(program, {"file": file, "fifo": str(fifo)})  # noqa: S102 (the sources above)
    os.close(other_end)


async def test_a_callback_that_waits_for_a_thread_is_found(detector: Detector) -> None:
    asyncio.get_running_loop().call_soon(threading.Event().wait, 4 * LONGEST_S)
    await asyncio.get_running_loop().run_in_executor(None, int)
    assert len(detector.found) == 1
    assert "a callback was blocked for" in detector.found[0]
    assert "Event.wait" in detector.found[0]


async def test_a_callback_that_computes_for_long_is_not_blocked(detector: Detector) -> None:
    end = time.thread_time() + 2 * LONGEST_S
    while time.thread_time() < end:
        pass
    await asyncio.get_running_loop().run_in_executor(None, int)
    assert detector.found == []


@pytest.mark.parametrize("event", CALLS)
async def test_a_call_that_may_block_is_found_even_if_it_returns_at_once(
    detector: Detector, tmp_path: Path, event: str
) -> None:
    run(CALLS[event], tmp_path, place="shim/example.py")
    assert detector.found == [f"{event} may block: shim/example.py:1: <module>"]


@pytest.mark.parametrize("call", HARMLESS)
async def test_a_call_that_cannot_block_is_not_found(detector: Detector, tmp_path: Path, call: str) -> None:
    run(HARMLESS[call], tmp_path, place="shim/example.py")
    assert detector.found == []


async def test_a_test_itself_may_block(detector: Detector, tmp_path: Path) -> None:
    run(CALLS["fcntl.flock"], tmp_path, place="tests/example.py")
    assert detector.found == []


@pytest.mark.parametrize("event", CALLS)
def test_without_a_loop_every_call_may_block(detector: Detector, tmp_path: Path, event: str) -> None:
    run(CALLS[event], tmp_path, place="shim/example.py")
    assert detector.found == []

"""A container reads a file while the host changes it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.e2e.interpreter import interpreter
from tests.e2e.programs.rewriting import rewrite
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack
    from tests.e2e.interpreter import Interpreter

#: How long the host's file is read, and how long a read of a mixture is waited for where there may be one.
READING_S, MIXED_WITHIN_S = 5.0, patient(60.0)
PAUSE_S, VERSIONS = 0.05, 10
READS = 10


def after(versions: int) -> Callable[[], bool]:
    """End when that many versions were written."""
    left = iter(range(1, versions))
    return lambda: next(left, None) is None


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def box(either_stack: Stack, volume: Path) -> Iterator[Interpreter]:
    with interpreter(either_stack, binds={volume: "/volume"}) as opened:
        yield opened


def test_a_file_written_by_the_host_is_read_in_full(box: Interpreter, volume: Path) -> None:
    last = rewrite(str(volume / "file"), pause_s=PAUSE_S, is_over=after(VERSIONS)).decode()

    assert last in (box.ask("cat", "/volume/file") for _ in range(READS))


@pytest.mark.inherent("fresh-length")
def test_a_file_is_read_as_it_was_before_or_after_a_write_of_the_host(box: Interpreter, volume: Path) -> None:
    path = volume / "changing"
    rewrite(str(path), pause_s=PAUSE_S, is_over=after(1))  # what the first of the next versions is, too
    read, reading_s = threading.Event(), MIXED_WITHIN_S if box.stack.is_hako else READING_S
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(rewrite, str(path), pause_s=PAUSE_S, is_over=read.is_set)
        try:
            whole, mixed = map(int, box.run("rewriting", "/volume/changing", str(reading_s)).split())
        finally:
            read.set()
        writing.result()
    assert whole > 0
    assert mixed == 0

"""A container reads a file while the host changes it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.e2e.interpreter import interpreter
from tests.e2e.programs.rewriting import rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack
    from tests.e2e.interpreter import Interpreter

WRITING_S, READING_S, PAUSE_S = 8.0, 5.0, 0.05
READS = 10


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def box(either_stack: Stack, volume: Path) -> Iterator[Interpreter]:
    with interpreter(either_stack, binds={volume: "/volume"}) as opened:
        yield opened


def test_a_file_written_by_the_host_is_read_in_full(box: Interpreter, volume: Path) -> None:
    last = rewrite(str(volume / "file"), seconds=0.5, pause_s=PAUSE_S).decode()

    assert last in (box.execute("cat", "/volume/file") for _ in range(READS))


@pytest.mark.inherent("fresh-length")
def test_a_file_is_read_as_it_was_before_or_after_a_write_of_the_host(box: Interpreter, volume: Path) -> None:
    path = volume / "changing"
    rewrite(str(path), seconds=0.1, pause_s=PAUSE_S)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(rewrite, str(path), seconds=WRITING_S, pause_s=PAUSE_S)
        whole, mixed = map(int, box.run("rewriting", "/volume/changing", str(READING_S)).split())
        writing.result()
    assert whole > 0
    assert mixed == 0

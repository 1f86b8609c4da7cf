"""The load program that the benchmarks of the data paths run on both sides."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scripts.benchmarks import load
from scripts.benchmarks.stage import MeasurementError
from scripts.benchmarks.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
COMMAND = (sys.executable, "-ISB", load.__file__)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("load", COMMAND) as running:
        yield running


def test_it_needs_nothing_but_what_is_built_into_the_interpreter() -> None:
    tree = ast.parse(Path(load.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names} | {
        node.module for node in tree.body if isinstance(node, ast.ImportFrom)
    }

    assert imported == {"_socket", "os", "select", "sys", "time"}


def test_a_file_has_the_size_that_was_ordered(worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "file"

    took_s = worker.ask("write", file, 2 * MIB)

    assert took_s > 0
    assert file.read_bytes() == bytes(2 * MIB)
    for work in (("read",), ("random_write", 10), ("random_read", 10)):
        assert worker.ask(work[0], file, 2 * MIB, *work[1:]) > 0
    assert file.stat().st_size == 2 * MIB


def test_a_tree_is_gone_afterwards(worker: Worker, tmp_path: Path) -> None:
    assert worker.ask("tree", tmp_path, 200) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_told(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"load: .*No such file"):
        worker.ask("read", tmp_path / "absent", MIB)


def test_a_program_that_ends_is_told() -> None:
    with (
        pytest.raises(MeasurementError, match="load: it ended: nothing works"),
        Worker("load", ["sh", "-c", "echo nothing works >&2"]),
    ):
        pass

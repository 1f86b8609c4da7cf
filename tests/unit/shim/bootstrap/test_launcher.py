"""The launcher runs from anywhere, and its interpreter needs no installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from shim.bootstrap import launcher
from shim.refusal import Refusal
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / launcher.NAME
    path.parent.mkdir()
    path.write_text("what pip put there")
    launcher.write(path)
    return path


def said(program: Path, *arguments: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [str(program), *arguments], cwd="/", env={}, capture_output=True, timeout=WITHIN_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_it_gives_the_same_answers_as_pips_program(program: Path) -> None:
    expected = subprocess.run(
        [sys.executable, "-m", "shim.bootstrap", "-v"], capture_output=True, timeout=WITHIN_S, check=True
    )
    assert said(program, "-v") == (0, expected.stdout, b"")


def test_it_works_through_a_symbolic_link(program: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(program)
    assert said(link, "-v") == said(program, "-v")


def test_a_failure_is_one_line(program: Path) -> None:
    status, output, errors = said(program, "-address", "/nowhere", "delete")
    assert (status, output) == (1, b"")
    assert errors.startswith(b"delete: id: ")


def test_it_replaces_pips_program_atomically(program: Path) -> None:
    assert list(program.parent.iterdir()) == [program]
    assert os.access(program, os.X_OK)


def test_an_interpreter_with_a_long_path_is_refused() -> None:
    with pytest.raises(Refusal, match="its path is too long for a script; use pip's program"):
        launcher.text("/" + "x" * 130)

"""A failed sandbox's reason and last console output are kept, within limits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from shim.telemetry import postmortem

if TYPE_CHECKING:
    from pathlib import Path


def keep(
    log_dir: Path, sandbox_id: str, *, namespace: str = "default", reason: str = "guest panicked"
) -> None:
    postmortem.write(
        log_dir, namespace=namespace, sandbox_id=sandbox_id, reason=reason, console=["line 1", "line 2"]
    )


@pytest.mark.parametrize("name", ["*", "bo?", "[b]ox", "../box", "/box"])
def test_an_id_is_not_taken_for_a_pattern(tmp_path: Path, name: str) -> None:
    postmortem.write(tmp_path, namespace="a", sandbox_id="box", reason="in a", console=[])

    assert postmortem.read(tmp_path, sandbox_id=name) == ""


def test_the_reason_and_the_console_are_read_back(tmp_path: Path) -> None:
    keep(tmp_path / "new", "box")
    first, *console = postmortem.read(tmp_path / "new", sandbox_id="box").splitlines()
    assert first.endswith(" guest panicked")
    assert console == ["console: line 1", "console: line 2"]


def test_only_the_last_failure_of_an_id_is_kept(tmp_path: Path) -> None:
    keep(tmp_path, "box", reason="first")
    keep(tmp_path, "box", reason="second")
    text = postmortem.read(tmp_path, sandbox_id="box")
    assert "second" in text
    assert "first" not in text


def test_failures_can_be_filtered_by_namespace(tmp_path: Path) -> None:
    keep(tmp_path, "box", namespace="a", reason="in a")
    keep(tmp_path, "box", namespace="b", reason="in b")
    assert "in a" not in postmortem.read(tmp_path, sandbox_id="box", namespace="b")
    assert "in a" in postmortem.read(tmp_path, sandbox_id="box")


def test_the_oldest_files_are_removed(tmp_path: Path) -> None:
    for number in range(postmortem.KEPT_FILES + 1):
        keep(tmp_path, f"box{number}")
        os.utime(
            postmortem.path_of(tmp_path, namespace="default", sandbox_id=f"box{number}"), (number, number)
        )
    keep(tmp_path, "last")
    assert len(list(tmp_path.iterdir())) == postmortem.KEPT_FILES
    assert not postmortem.read(tmp_path, sandbox_id="box0")
    assert postmortem.read(tmp_path, sandbox_id="last")


def test_without_files_nothing_is_read(tmp_path: Path) -> None:
    assert postmortem.read(tmp_path / "none", sandbox_id="box") == ""

"""What runs in the outer machine, by the command line that asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts import kvm, outer
from tests import patience

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stand in for the outer machine; returns what it is given."""
    calls = []

    def run(command: list[str], **given: dict[str, str] | float | Path) -> int:
        calls.append((command, given))
        return 3

    monkeypatch.setattr(outer, "run", run)
    monkeypatch.setattr(kvm.tempfile, "tempdir", str(tmp_path))
    return calls


def files(command: list[str]) -> list[str]:
    return [word for word in command if word.startswith("tests/")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["test"], list(kvm.ALL)),
        (["test", "-x"], list(kvm.ALL)),
        (["test", "--short"], list(kvm.SHORT)),
        (["test", "tests/cri", "-k", "life"], ["tests/cri"]),
        (["test", "--short", "tests/cri"], ["tests/cri"]),
    ],
    ids=["all", "an option", "the short part", "named", "named, in a short time"],
)
def test_the_tests_that_are_named_run_or_else_those_that_are_listed(
    started: list[Any], arguments: list[str], expected: list[str]
) -> None:
    assert kvm.main(arguments) == 3
    [(command, _)] = started
    assert files(command) == expected
    assert command[1:3] == ["-m", "pytest"]
    assert all(argument in command for argument in arguments[1:] if argument != "--short")


def test_what_is_listed_is_there() -> None:
    assert all((outer.TREE / path).is_file() for path in kvm.ALL)


def test_tests_there_have_more_time_and_leave_a_report(started: list[Any]) -> None:
    kvm.main(["test"])
    [(command, given)] = started
    assert float(given["environment"][patience.VARIABLE]) == kvm.PATIENCE > 1
    assert f"--junitxml={outer.RESULTS}/report.xml" in command
    assert given["results"].is_dir()


def test_benchmarks_leave_their_results(started: list[Any]) -> None:
    kvm.main(["bench", "clone_over_cold"])
    [(command, _)] = started
    assert command[1:] == [
        *("-m", "scripts.benchmarks", "clone_over_cold", "--json", f"{outer.RESULTS}/results.json")
    ]

"""How the command line decides what runs in the outer machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from scripts import kvm, outer
from tests import patience, progress
from tests.progress import Progress

if TYPE_CHECKING:
    from typing import Any


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stand in for the outer machine; return what it is given."""
    calls = []

    def run(command: list[str], **given: dict[str, str] | float | Path) -> int:
        calls.append((command, given))
        return 3

    monkeypatch.setattr(outer, "run", run)
    monkeypatch.setattr(outer, "problem", lambda: None)
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
def test_the_named_tests_run_or_else_the_listed_ones(
    started: list[Any], arguments: list[str], expected: list[str]
) -> None:
    assert kvm.main(arguments) == 3
    [(command, _)] = started
    assert files(command) == expected
    assert command[1:3] == ["-m", "pytest"]
    assert all(argument in command for argument in arguments[1:] if argument != "--short")


@pytest.mark.parametrize("listed", kvm.ALL)
def test_every_listed_file_exists(listed: str) -> None:
    file, _, test = listed.partition("::")
    assert f"def {test.partition('[')[0]}" in (outer.TREE / file).read_text(encoding="utf-8")


def test_a_host_without_support_for_an_outer_machine_is_refused_with_the_reason(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outer, "problem", lambda: "outer machine: no room; make some")
    assert kvm.main(["test", "--short"]) == 2
    assert started == []
    assert capsys.readouterr().err == "kvm: outer machine: no room; make some\n"


def test_newer_programs_replace_older_ones(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    replacements = {Path("/usr/bin/older"): Path("/usr/bin/newer")}
    monkeypatch.setattr(kvm.newer, "prepare", lambda: replacements)
    kvm.main(["test", "--newer", "--short"])
    kvm.main(["test", "--short"])
    assert [given["replacements"] for _, given in started] == [replacements, {}]
    assert [given["environment"].get("HAKO_TEST_JAIL") for _, given in started] == ["off", None]
    assert [files(command) for command, _ in started] == [list(kvm.SHORT)] * 2


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("wanted", [False, True])
def test_results_are_kept_after_a_failure_or_on_request(
    monkeypatch: pytest.MonkeyPatch, started: list[Any], tmp_path: Path, *, status: int, wanted: bool
) -> None:
    seen: list[Path] = []

    def run(_command: list[str], *, results: Path, **_: object) -> int:
        seen.append(results)
        return status

    monkeypatch.setattr(outer, "run", run)
    options = ["--results", str(tmp_path / "here")] if wanted else []
    assert kvm.main(["test", "--short", *options]) == status
    assert [place.is_dir() for place in seen] == [wanted or status != 0]
    assert not wanted or seen == [tmp_path / "here"]


class Machine:
    """Stands in for outer machines: each run notes tests as the plugin does.

    :param ends: for each run, the tests that pass and the exit status.
    """

    def __init__(self, *ends: tuple[set[str], int]) -> None:
        self._ends = list(ends)
        self.ran: list[list[str]] = []

    def run(self, command: list[str], *, results: Path, **_: object) -> int:
        passing, status = self._ends.pop(0)
        self.ran.append(files(command))
        noted = Progress(results / "progress")
        noted.pytest_collection_finish(
            cast("Any", SimpleNamespace(items=[SimpleNamespace(nodeid=each) for each in self.ran[-1]]))
        )
        for name in passing:
            noted.pytest_runtest_logreport(
                cast("Any", SimpleNamespace(nodeid=name, when="teardown", failed=False))
            )
        return status


BOTH = ["tests/unit/a.py", "tests/unit/b.py"]


@pytest.mark.parametrize(
    ("ends", "ran", "status", "late"),
    [
        pytest.param([({*BOTH}, 0)], [BOTH], 0, [], id="all pass"),
        pytest.param([({BOTH[0]}, 1), ({BOTH[1]}, 0)], [BOTH, BOTH[1:]], 0, BOTH[1:], id="one passes later"),
        pytest.param([({BOTH[0]}, 1), (set(), 1)], [BOTH, BOTH[1:]], 1, [], id="one never passes"),
        pytest.param([({*BOTH}, 1)], [BOTH], 1, [], id="the machine breaks at the end"),
        pytest.param([(set(), 4)], [BOTH], 4, [], id="pytest refuses its arguments"),
    ],
)
def test_tests_that_have_not_passed_run_once_more(
    monkeypatch: pytest.MonkeyPatch,
    started: list[Any],
    capsys: pytest.CaptureFixture[str],
    *,
    ends: list[tuple[set[str], int]],
    ran: list[list[str]],
    status: int,
    late: list[str],
) -> None:
    machine = Machine(*ends)
    monkeypatch.setattr(outer, "run", machine.run)
    assert kvm.main(["test", "-x", *BOTH]) == status
    assert machine.ran == ran
    shown = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in shown if "only in the second machine" in line] == late


def test_a_test_whose_teardown_fails_has_not_passed(tmp_path: Path) -> None:
    noted = Progress(tmp_path / "progress")
    noted.pytest_collection_finish(
        cast("Any", SimpleNamespace(items=[SimpleNamespace(nodeid="tests/a.py::b[c d]")]))
    )
    noted.pytest_runtest_logreport(
        cast("Any", SimpleNamespace(nodeid="tests/a.py::b[c d]", when="teardown", failed=True))
    )
    assert progress.remaining(tmp_path / "progress") == ["tests/a.py::b[c d]"]


def test_a_run_that_never_began_has_no_list_of_tests(tmp_path: Path) -> None:
    assert progress.remaining(tmp_path / "progress") is None


def test_tests_in_the_outer_machine_get_more_time_and_leave_a_report(started: list[Any]) -> None:
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


@pytest.mark.parametrize("tree", ["/tmp/hako", "/run/hako", "/dev/shm/hako"])
def test_a_tree_that_the_outer_machine_would_hide_is_refused(
    monkeypatch: pytest.MonkeyPatch, tree: str
) -> None:
    monkeypatch.setattr(outer, "TREE", Path(tree))

    assert str(outer.problem()).startswith(f"outer machine: {tree}: ")

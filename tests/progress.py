"""Keep a list of the tests of a run and of those that have passed, even if the run never ends.

``pytest -p tests.progress``, with the variable below.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

VARIABLE = "HAKO_TEST_PROGRESS"
"""The environment variable that names the file."""

_COLLECTED, _ENDED, _FAILED = "collected", "ended", "failed"


def remaining(file: Path) -> list[str] | None:
    """List the tests that have not passed, in their order.

    :param file: the file that the run has written.
    :returns: None if the run did not get to its first test.
    """
    if not file.exists():
        return None
    lines = [line.split(" ", 1) for line in file.read_text(encoding="utf-8").splitlines()]
    names = {
        event: [name for other, name in lines if other == event] for event in (_COLLECTED, _ENDED, _FAILED)
    }
    passed = set(names[_ENDED]) - set(names[_FAILED])
    return [name for name in names[_COLLECTED] if name not in passed]


class Progress:
    """Writes the list.

    :param file: its path.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """List the tests of the run."""
        self._write(_COLLECTED, [item.nodeid for item in session.items])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure of a test or of its fixtures, and the test's end."""
        if report.failed:
            self._write(_FAILED, [report.nodeid])
        if report.when == "teardown":
            self._write(_ENDED, [report.nodeid])

    def _write(self, event: str, names: Sequence[str]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(f"{event} {name}\n" for name in names)


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin, if the variable is set."""
    if file := os.environ.get(VARIABLE):
        config.pluginmanager.register(Progress(Path(file)))

"""Show each failure when it happens, not only at the end of a run that takes hours.

``pytest -p tests.failures_at_once``; pytest's report at the end stays the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter


class FailuresAtOnce:
    """Writes the failure below the line that reports it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)  # after the line
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the failure of a test or a fixture, with the output that was captured."""
        if not report.failed:
            return
        terminal = cast("TerminalReporter", self._config.pluginmanager.get_plugin("terminalreporter"))
        terminal.ensure_newline()
        for title, text in (("failure", report.longreprtext), *report.sections):
            terminal.write_line(f"--- {title}")
            terminal.write_line(text)


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin."""
    config.pluginmanager.register(FailuresAtOnce(config))

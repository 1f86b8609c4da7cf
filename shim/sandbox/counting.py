"""A sandbox's entries in its node's journal, for monitors: its start, its failures, its end."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from shim.errors import ShimError
from shim.telemetry import latency, timeline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.telemetry.journal import Journal


class Counting:
    """Records the events of one sandbox.

    :param journal: the journal.
    :param created_at_s: when the sandbox was requested, in seconds since 1970.
    """

    def __init__(self, journal: Journal, *, created_at_s: float) -> None:
        self._journal = journal
        self._created_at_s = created_at_s

    def started(self, template: str) -> None:
        """Record that the machine runs.

        :param template: ``hit`` if it was cloned, ``miss`` without a template, empty if none was wanted.
        """
        self._journal.note(
            "start",
            {
                "how": "clone" if template == "hit" else "cold",
                "took_s": time.time() - self._created_at_s,
                "template": template,
                "phases": timeline.durations(),
            },
        )

    def container_started(self, took_s: float) -> None:
        """Record the start of a container.

        :param took_s: how long Create and Start took, in seconds.
        """
        self._journal.note("container", {"took_s": took_s})

    def failed(self, phase: str, *, cause: str) -> None:
        """Note a failure.

        :param phase: when.
        :param cause: the kind of error.
        """
        self._journal.note("failure", {"phase": phase, "cause": cause})

    @contextlib.contextmanager
    def failures(self, phase: str) -> Iterator[None]:
        """Record a failure of the block.

        :param phase: the name of the block's work.
        """
        try:
            yield
        except ShimError as error:
            self.failed(phase, cause=type(error).__name__)
            raise

    def ended(self) -> None:
        """Record the total of dropped data."""
        if latency.dropped:
            self._journal.note("end", {"dropped": latency.dropped})

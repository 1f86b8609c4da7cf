"""The report of a command: a line for each step as it happens, or one JSON value at the end."""

from __future__ import annotations

import json


class Steps:
    """The steps of one command.

    :param as_json: whether they are kept for the end.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._kept: list[dict[str, str]] = []

    def say(self, line: str) -> None:
        """Report one step.

        :param line: as ``removed: /run/hako``: what was done, and to what.
        """
        if not self._as_json:
            print(line)
            return
        what, _, detail = line.partition(": ")
        self._kept.append({"what": what, "detail": detail})

    def end(self) -> None:
        """Print the JSON value, if that is wanted."""
        if self._as_json:
            print(json.dumps(self._kept, indent=2))

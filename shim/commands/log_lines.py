"""The log lines of a sandbox: reads their text and time from files."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from hypervisor import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_LINE = 4096  # characters of a line that are shown
_RECORD = re.compile(r'time="([^"]*)" level=(\w+) msg="((?:[^"\\]|\\.)*)" logger=(\S+)')
_OUTPUT_LOGGER = "hypervisor.output"
_TIMES_SUFFIX = ".times"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """A line.

    :param at_s: when it was written, in seconds since 1970.
    :param source: ``shim``, ``guest``, or the name of a process of the machine.
    :param level: the level of the shim's own lines; empty for others.
    :param text: safe to print.
    """

    at_s: float
    source: str
    level: str
    text: str


def of_log(lines: Iterable[str]) -> Iterator[LogLine]:
    """Read the shim's lines, without unfinished ones."""
    for line in lines:
        found = _RECORD.match(line)
        if found is None:
            continue
        written, level, message, logger = found.groups()
        text = message.replace('\\"', '"').replace("\\\\", "\\")
        source = "shim"
        if logger == _OUTPUT_LOGGER:
            source, _, text = text.partition(": ")
            level = ""
        at_s = datetime.fromisoformat(written).timestamp()
        yield LogLine(at_s=at_s, source=source, level=level, text=printable(text, limit=_LINE))


def of_console(content: bytes, times: Iterable[str], *, since: int = 0) -> Iterator[LogLine]:
    """Read the guest's lines.

    :param content: the console's content, from an offset on.
    :param times: lines ``OFFSET SECONDS``: when the output from there on arrived.
    :param since: the offset.
    """
    notes = []
    for line in times:
        offset, _, came = line.partition(" ")
        if offset.isdigit() and came.strip():
            notes.append((int(offset), float(came)))
    place = since
    for raw in content.split(b"\n"):
        text = printable(raw.decode(errors="replace").replace("\r", ""), limit=_LINE)
        if text:
            index = bisect.bisect_right(notes, (place, float("inf"))) - 1
            at_s = notes[max(index, 0)][1] if notes else 0.0
            yield LogLine(at_s=at_s, source="guest", level="", text=text)
        place += len(raw) + 1


class LogFile:
    """A growing file.

    :param kind: ``log`` or ``console``.
    :param path: the file.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.path = path
        self._kind = kind
        self._read = 0

    def new_lines(self, *, unfinished: bool = False) -> list[LogLine]:
        """Read what was added since the last call; a missing file has nothing new.

        :param unfinished: also read a last line that has no end yet; nothing may be read after it.
        """
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._read:  # it was shortened, and its newest part is in it
                    self._read = 0
                since = file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content if unfinished else content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        if self._kind == "log":
            return list(of_log(whole.decode(errors="replace").splitlines()))
        try:
            times = self.path.with_suffix(_TIMES_SUFFIX).read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            times = []
        return list(of_console(whole, times, since=since))

"""A timeline as data: phases in lanes, read from the records of a sandbox's processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypervisor import printable
from shim.telemetry.timeline import AGENT, CONTAINERD, KERNEL, MACHINE, SHIM, START

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_OF_GUEST, _LONGEST_OF_GUEST = 200, 60
_ORDER = (CONTAINERD, START, SHIM, MACHINE, KERNEL, AGENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase that took time, or a moment that took none.

    :param lane: the lane of its process.
    :param name: its name.
    :param began_s: in seconds since the beginning of the timeline.
    :param ended_s: likewise, not before it began.
    """

    lane: str
    name: str
    began_s: float
    ended_s: float

    @property
    def took_s(self) -> float:
        """Its duration."""
        return self.ended_s - self.began_s

    @property
    def is_moment(self) -> bool:
        """Whether it took no time at all."""
        return self.began_s == self.ended_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The phases of one process.

    :param name: who.
    :param rows: phases, those that overlap in rows below each other; each row in the order of time.
    """

    name: str
    rows: tuple[tuple[Phase, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The start of a sandbox.

    :param title: the sandbox's name.
    :param phases: sorted by their beginning, longer ones first; the first begins at 0.
    """

    title: str
    phases: tuple[Phase, ...]

    @property
    def length_s(self) -> float:
        """When the last phase ended."""
        return max((phase.ended_s for phase in self.phases), default=0.0)

    def lanes(self) -> tuple[Lane, ...]:
        """Sort the phases into lanes: from containerd to the guest, then the containers in order."""
        names = dict.fromkeys((*_ORDER, *(phase.lane for phase in self.phases)))
        found = ((name, [phase for phase in self.phases if phase.lane == name]) for name in names)
        return tuple(Lane(name=name, rows=_stacked(phases)) for name, phases in found if phases)


def parse(text: str, *, title: str) -> Timeline:
    """Read a timeline.

    :param text: the file; torn lines are left out.
    :param title: the sandbox's name.
    """
    entries = [entry for entry in map(_entry, text.splitlines()) if entry is not None]
    zero_s = min((began_s for _, _, began_s, _ in entries), default=0.0)
    phases = [
        Phase(lane=lane, name=name, began_s=began_s - zero_s, ended_s=max(began_s, ended_s) - zero_s)
        for lane, name, began_s, ended_s in entries
    ]
    return Timeline(
        title=title, phases=tuple(sorted(phases, key=lambda phase: (phase.began_s, -phase.ended_s)))
    )


def guest_phases(report: str, *, asked_s: float, answered_s: float, since_s: float) -> list[Phase]:
    """Read the report of the guest's agent, in the host's time.

    The guest is assumed to read its clock in the middle of the call. Phases from before the sandbox's
    machine existed belong to its template.

    :param report: the time now, then a line ``BEGAN ENDED WHO NAME`` for each phase; all in seconds.
    :param asked_s: when the request was sent, in seconds of ``time.monotonic()``.
    :param answered_s: when the answer arrived.
    :param since_s: when the machine was started.
    """
    first, *lines = report.splitlines() or [""]
    phases = []
    try:
        offset_s = (asked_s + answered_s) / 2 - float(first)
        for line in lines[:_MOST_OF_GUEST]:
            began, ended, lane, name = line.split(" ", 3)
            began_s, ended_s = float(began) + offset_s, float(ended) + offset_s
            if lane in {KERNEL, AGENT} and since_s <= began_s <= ended_s <= answered_s:
                phases.append(
                    Phase(
                        lane=lane,
                        name=printable(name, limit=_LONGEST_OF_GUEST, replacement="?"),
                        began_s=began_s,
                        ended_s=ended_s,
                    )
                )
    except ValueError:
        return phases
    return phases


def table(timeline: Timeline) -> str:
    """Format a timeline for a terminal, one line for each phase."""
    width = max((len(phase.lane) for phase in timeline.phases), default=0)
    lines = [f"{timeline.title}: {timeline.length_s * 1000:.0f} ms"]
    for phase in timeline.phases:
        took = "" if phase.is_moment else f"{phase.took_s * 1000:.1f}"
        lines.append(f"{phase.began_s * 1000:>9.1f} {took:>9} ms  {phase.lane:<{width}}  {phase.name}")
    return "".join(f"{line}\n" for line in lines)


def _entry(line: str) -> tuple[str, str, float, float] | None:
    try:
        match json.loads(line):
            case [str(lane), str(name), (int() | float()) as began_s, (int() | float()) as ended_s]:
                return lane, name, float(began_s), float(ended_s)
    except (ValueError, RecursionError):
        pass
    return None


def _stacked(phases: Iterable[Phase]) -> tuple[tuple[Phase, ...], ...]:
    """Put each phase into the first row where it overlaps with no other."""
    rows: list[list[Phase]] = []
    for phase in phases:
        row = next((row for row in rows if row[-1].ended_s <= phase.began_s), None)
        if row is None:
            rows.append([phase])
        else:
            row.append(phase)
    return tuple(map(tuple, rows))


def trace(timeline: Timeline) -> dict[str, Any]:
    """Convert a timeline to the format that Perfetto and Chrome read.

    The source is the "Trace Event Format", with times in microseconds. A lane is a process of it, a row
    a thread.

    :returns: a JSON document.
    """
    events: list[dict[str, Any]] = []
    for pid, lane in enumerate(timeline.lanes(), 1):
        events += (
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": lane.name}},
            {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}},
        )
        for tid, row in enumerate(lane.rows, 1):
            events += ({"pid": pid, "tid": tid, "cat": lane.name, **_event(phase)} for phase in row)
    return {"displayTimeUnit": "ms", "otherData": {"sandbox": timeline.title}, "traceEvents": events}


def _event(phase: Phase) -> dict[str, Any]:
    began = {"name": phase.name, "ts": phase.began_s * 1e6}
    if phase.is_moment:
        return {"ph": "i", "s": "p", **began}
    return {"ph": "X", "dur": phase.took_s * 1e6, **began}

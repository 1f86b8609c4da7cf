"""What a process of the host uses: memory and processor time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_USER_TICKS, _SYSTEM_TICKS = 11, 12  # fields 14 and 15 of proc(5) stat, counted after the name


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """What one process uses.

    :param memory_bytes: its own pages, and its part of those that it shares (PSS).
    :param resident_bytes: all its pages in memory.
    :param cpu_s: the processor time that it has had, in seconds.
    """

    memory_bytes: int
    resident_bytes: int
    cpu_s: float


def measure(pid: int) -> ProcessUsage:
    """Measure a process.

    :param pid: its id.
    :raises ProcessLookupError: if there is none.
    :raises OSError: if it cannot be measured.
    """
    directory = Path(f"/proc/{pid}")
    try:
        stat = (directory / "stat").read_bytes()
        sizes = (directory / "smaps_rollup").read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error
    # The command name, in parentheses, may hold spaces and parentheses itself.
    fields = stat[stat.rindex(b")") + 1 :].split()
    ticks = int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
    found = dict(line.split()[:2] for line in sizes.splitlines()[1:])
    return ProcessUsage(
        memory_bytes=int(found["Pss:"]) * _KIB,
        resident_bytes=int(found["Rss:"]) * _KIB,
        cpu_s=ticks / _TICKS_PER_S,
    )

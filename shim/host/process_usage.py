"""The kernel's counters of a host process: memory, processor time, threads, input and output."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: Fields of proc(5) ``stat``, counted after the command's name.
_STAT = {"utime": 11, "stime": 12, "cutime": 13, "cstime": 14}
_STATUS = ("VmPeak", "VmSize", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmData", "VmSwap")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """The usage of one process.

    :param memory_bytes: its own pages, and its share of common pages (PSS).
    :param resident_bytes: all its pages in memory.
    :param cpu_s: the processor time that it has used, in seconds.
    """

    memory_bytes: int
    resident_bytes: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessDetails:
    """All counters of one process.

    :param usage: its usage.
    :param threads: how many it has.
    :param descriptors: how many it has open.
    :param status: sizes from ``status``, in bytes, by their names in lower case.
    :param stat: times from ``stat``, in ticks.
    :param io: the values in ``io``.
    """

    usage: ProcessUsage
    threads: int
    descriptors: int
    status: dict[str, int]
    stat: dict[str, int]
    io: dict[str, int]


def measure(pid: int) -> ProcessUsage:
    """Measure a process.

    :param pid: its id.
    :raises ProcessLookupError: if there is none.
    :raises OSError: if it cannot be measured.
    """
    return _usage(pid, _stat(pid))


def measure_in_detail(pid: int) -> ProcessDetails:
    """Measure all of a process.

    :param pid: its id.
    :raises ProcessLookupError: if there is none.
    :raises OSError: if it cannot be measured.
    """
    stat = _stat(pid)
    status = _table(pid, "status")
    return ProcessDetails(
        usage=_usage(pid, stat),
        threads=_number(status["Threads"]),
        descriptors=sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        status={name.lower(): _number(status[name]) * _KIB for name in _STATUS if name in status},
        stat=stat,
        io={name.lower(): _number(value) for name, value in _table(pid, "io").items()},
    )


def _usage(pid: int, stat: dict[str, int]) -> ProcessUsage:
    sizes = _table(pid, "smaps_rollup")
    return ProcessUsage(
        memory_bytes=_number(sizes["Pss"]) * _KIB,
        resident_bytes=_number(sizes["Rss"]) * _KIB,
        cpu_s=(stat["utime"] + stat["stime"]) / _TICKS_PER_S,
    )


def _stat(pid: int) -> dict[str, int]:
    content = _content(pid, "stat")
    # The command's name, in parentheses, may hold spaces and parentheses itself.
    fields = content[content.rindex(")") + 1 :].split()
    return {name: int(fields[place]) for name, place in _STAT.items()}


def _table(pid: int, name: str) -> dict[str, str]:
    lines = (line.partition(":") for line in _content(pid, name).splitlines())
    return {name: value for name, colon, value in lines if colon}


def _content(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error


def _number(text: str) -> int:
    return int(text.split(maxsplit=1)[0])

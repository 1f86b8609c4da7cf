"""What the kernel counts of one process: memory, processor time, threads, input and output; see proc(5)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_KIB = 1024
#: Fields of ``stat``, counted after the command's name.
_STAT = {"utime": 11, "stime": 12, "cutime": 13, "cstime": 14}
_STATUS = ("VmPeak", "VmSize", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmData", "VmSwap")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessNumbers:
    """The numbers of one process.

    :param memory_bytes: its own pages, and its part of those that it shares (PSS).
    :param cpu_s: the processor time that it has had, in seconds.
    :param threads: how many it has.
    :param descriptors: how many it has open.
    :param status: sizes from ``status``, in bytes, by their names in lower case.
    :param stat: times from ``stat``, in ticks.
    :param io: what ``io`` says.
    """

    memory_bytes: int
    cpu_s: float
    threads: int
    descriptors: int
    status: dict[str, int]
    stat: dict[str, int]
    io: dict[str, int]


def read(pid: int) -> ProcessNumbers:
    """Read the numbers of a process.

    :param pid: its id.
    :raises OSError: if it has ended, or may not be read.
    """
    directory = Path(f"/proc/{pid}")
    raw = (directory / "stat").read_bytes()
    # The command's name, in parentheses, may hold spaces and parentheses itself.
    fields = raw[raw.rindex(b")") + 1 :].split()
    stat = {name: int(fields[place]) for name, place in _STAT.items()}
    status = _table(directory / "status")
    return ProcessNumbers(
        memory_bytes=_number(_table(directory / "smaps_rollup")["Pss"]) * _KIB,
        cpu_s=(stat["utime"] + stat["stime"]) / _TICKS_PER_S,
        threads=_number(status["Threads"]),
        descriptors=sum(1 for _ in (directory / "fd").iterdir()),
        status={name.lower(): _number(status[name]) * _KIB for name in _STATUS if name in status},
        stat=stat,
        io={name.lower(): _number(value) for name, value in _table(directory / "io").items()},
    )


def _table(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}


def _number(text: str) -> int:
    return int(text.split(maxsplit=1)[0])

"""Tables for people: aligned columns of text, and values as people read them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

_MIB = 1 << 20
_AGES = ((86400, "d"), (3600, "h"), (60, "min"))
_LONG_ID = 24  # people choose shorter ones
_SHOWN_ID = 13  # as crictl shows them
_CELL = 400
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"  # ECMA-48 SGR


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table whose columns are as wide as their contents.

    :param rows: the cells, heading first, the same number in each row. The last column may have any width.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True))
        yield "  ".join([*cells, row[-1]]).rstrip()


def print_table(rows: Sequence[Sequence[str]], *, room: os.terminal_size | None = None) -> None:
    """Print a table, with a highlighted heading on a terminal.

    :param rows: as for :func:`aligned`.
    :param room: the window that it must fit into; lines are cut, and the last one counts rows without room.
    """
    heading, *others = aligned(rows)
    if room is not None:
        most = max(room.lines - 2, 1)  # without the heading and the line of the cursor
        if len(others) > most:
            others[most - 1 :] = [f"... and {len(others) - most + 1} more"]
        heading, *others = (line[: room.columns] for line in (heading, *others))
    print(f"{_BOLD}{heading}{_PLAIN}" if is_coloured() else heading)
    for line in others:
        print(line)


def is_coloured() -> bool:
    """Tell whether the output is a terminal whose user wants colours, see no-color.org."""
    return is_screen() and not os.environ.get("NO_COLOR")


def is_screen(stream: TextIO | None = None) -> bool:
    """Tell whether a stream is a terminal that knows control sequences.

    :param stream: the stream; by default, the output.
    """
    return (stream or sys.stdout).isatty() and os.environ.get("TERM", "dumb") != "dumb"


def text(value: str) -> str:
    """Return text that others chose in a form that is safe to print."""
    from hypervisor import printable  # noqa: PLC0415 - many commands do not need the hypervisor

    return printable(value, limit=_CELL)


def shown_id(identifier: str) -> str:
    """Shorten a generated id."""
    return identifier[:_SHOWN_ID] if len(identifier) > _LONG_ID else identifier


def mib(size_bytes: float) -> str:
    """Write a size in bytes as people read it."""
    return f"{size_bytes / _MIB:.0f} MiB"


def age(seconds: float) -> str:
    """Write a length of time as people read it."""
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"

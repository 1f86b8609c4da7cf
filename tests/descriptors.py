"""The open descriptors of this process, for tests that nothing stays open."""

from __future__ import annotations

import contextlib
from pathlib import Path


def descriptors() -> frozenset[tuple[str, str]]:
    """Return each open descriptor's number, and what it refers to.

    What a test finds open in the end must be a part of what was open before. It need not be all of that: the
    garbage collector may close at any time what an earlier test has left open.
    """
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.add((link.name, str(link.readlink())))
    return frozenset(found)

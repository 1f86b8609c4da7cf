"""FIFOs between a test and a shim."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def is_full(fifo: Path) -> bool:
    """Tell whether nothing more fits into a FIFO: its pages may have room, each for the rest of one write."""
    end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(end, select.POLLOUT)
    try:
        return not poll.poll(0)
    finally:
        os.close(end)

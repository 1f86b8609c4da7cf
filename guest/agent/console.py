"""The agent's log: one line per event on the console, whose last lines are what an operator sees."""

from __future__ import annotations

import os
import time

_CONSOLE_FD = 2


def log(message: str) -> None:
    """Write one line to the console; line breaks inside it are flattened.

    :param message: what happened.
    """
    line = f"hako-agent [{time.monotonic():.3f}] {' '.join(message.split())}\n"
    try:
        os.write(_CONSOLE_FD, line.encode(errors="replace"))
    except OSError:
        # The console is a convenience: losing it must not take the containers along.
        return

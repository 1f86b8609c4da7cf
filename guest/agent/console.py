"""The agent's log: one line per event in the kernel log, and so on the console.

The kernel replays its log on a console that comes up late, as virtio's does if its driver is a module. So
even the earliest lines are not lost.
"""

from __future__ import annotations

import os

from proto.extensions import CONSOLE_MARK

# "quiet" on the kernel line keeps everything less severe than an error off the console.
_LEVEL = 3
_LONGEST = 900

_fd = -1


def log(message: str) -> None:
    """Write one line to the log; line breaks inside it are flattened.

    :param message: what happened.
    """
    global _fd  # noqa: PLW0603  one descriptor for the life of the machine
    line = f"<{_LEVEL}>{CONSOLE_MARK}{' '.join(message.split())[:_LONGEST]}\n"
    try:
        if _fd < 0:
            _fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
        os.write(_fd, line.encode(errors="replace"))
    except OSError:
        # The log is a convenience: its loss must not end the containers.
        return

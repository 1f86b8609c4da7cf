"""Run a program on a pseudo-terminal, as a person at a keyboard would."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import signal
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING

from tests.e2e.containerd import CALL_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WITHIN_S = CALL_TIMEOUT_S
TOLD_AGAIN_S = 2.0


class Terminal:
    """A program whose standard input, output and error are one terminal."""

    def __init__(self, argv: Sequence[str], *, rows: int = 24, columns: int = 80) -> None:
        """Start ``argv`` on a new terminal of the given size."""
        self._master, slave = os.openpty()
        self.resize(rows=rows, columns=columns)
        self.output = ""
        # It becomes the program. No Python may run in a child of a process that has threads, as gRPC's.
        self.process = subprocess.Popen(
            ["/usr/bin/setsid", "--ctty", *argv], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)

    def resize(self, *, rows: int, columns: int) -> None:
        """Change the size of the window; the kernel tells the program by SIGWINCH."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        """Type ``text``."""
        os.write(self._master, text.encode())

    def expect(self, pattern: str, *, timeout_s: float = WITHIN_S) -> re.Match[str]:
        """Read until ``pattern`` matches the unread part, and drop everything up to the end of the match.

        :raises AssertionError: if the program ends or ``timeout_s`` passes first.
        """
        deadline = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.output)):
            if not self._read(deadline):
                raise AssertionError(f"no {pattern!r} in {self.output!r}")
        self.output = self.output[match.end() :]
        return match

    def expect_after_resize(self, pattern: str) -> re.Match[str]:
        """As :meth:`expect`, after the size of the window has changed.

        ctr tells the container the size, and only then begins to hear of changes: it loses one in between.
        So it is told again until the pattern matches.
        """
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                return self.expect(pattern, timeout_s=TOLD_AGAIN_S)
            except AssertionError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                self.process.send_signal(signal.SIGWINCH)

    def wait(self, *, timeout_s: float = WITHIN_S) -> int:
        """Read to the end of the output and return the program's exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        """End the program, if it still runs, and the terminal."""
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self, deadline: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._master, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the last holder of the other side closed it
            return False
        self.output += data.decode(errors="replace")
        return bool(data)


@contextlib.contextmanager
def terminal(argv: Sequence[str], *, rows: int = 24, columns: int = 80) -> Iterator[Terminal]:
    """Keep a program on a terminal for a block."""
    opened = Terminal(argv, rows=rows, columns=columns)
    try:
        yield opened
    finally:
        opened.close()

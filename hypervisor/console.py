"""The guest's console: its last output in memory, and in a file of limited size."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

from hypervisor.allowance import Allowance
from hypervisor.printable import printable
from hypervisor.process import LINE_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

_TAIL_BYTES = 64 * 1024
_FILE_BYTES = 1024 * 1024
_BYTES_AT_ONCE, _BYTES_PER_S = 1024 * 1024, 1024 * 1024
_PAUSE_S = 0.1
_LAST_READS = 16
"""Several times what the socket holds."""
_TIMES_BYTES = 256 * 1024
_TIMES_APART_S = 0.1
TIMES_SUFFIX = ".times"
"""The suffix of the file with the times of output: lines `OFFSET SECONDS`, at most ten a second."""


class Console:
    """The reader of one guest's console.

    QEMU writes to a socket rather than to a file, so the host's disk never fills up, and each new line is an
    event. If a guest keeps writing more than 1 MiB per second, only 1 MiB per second is read; QEMU
    drops the rest.

    :param log: the file that keeps a copy; it never grows over 1 MiB, and always holds the newest output. The
        times of its parts go into a file beside it.
    :param on_pause: called each time that reading pauses because the guest writes too much.
    :param handover: closes QEMU's end of the socket once QEMU has inherited it.
    :raises OSError: if the file cannot be made.
    """

    def __init__(
        self, log: Path, *, handover: ExitStack, on_pause: Callable[[], None] = lambda: None
    ) -> None:
        self._log = log.open("wb", buffering=0)
        self._times = log.with_suffix(TIMES_SUFFIX).open("wb", buffering=0)
        self._noted_at_s = 0.0
        self._stream, qemu_end = socket.socketpair()
        handover.enter_context(qemu_end)
        self.qemu_fd = qemu_end.fileno()
        self._stream.settimeout(0)
        self._tail = bytearray()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._stream, self._read)
        self._on_pause = on_pause
        self._allowance = Allowance(burst=_BYTES_AT_ONCE, per_s=_BYTES_PER_S)
        self.grew = asyncio.Event()
        """Set whenever output arrives. Clear it before waiting for it."""

    def tail(self, lines: int) -> list[str]:
        """Return the last lines, which are safe to print.

        :param lines: how many at most.
        """
        text = self._tail.decode(errors="replace").replace("\r", "\n")
        shown = [line for each in text.split("\n") if (line := printable(each, limit=LINE_LIMIT))]
        return shown[-lines:] if lines > 0 else []

    def close(self) -> None:
        """Read what is still buffered, then close the stream and the file. May be called repeatedly."""
        if self._stream.fileno() < 0:
            return
        for _ in range(_LAST_READS):
            if not self._take():
                break
        self._loop.remove_reader(self._stream)
        self._stream.close()
        self._log.close()
        self._times.close()

    def _read(self) -> None:
        if not self._allowance.take(self._take()):
            self._loop.remove_reader(self._stream)
            self._loop.call_later(_PAUSE_S, self._go_on)
            self._on_pause()

    def _go_on(self) -> None:
        if self._stream.fileno() >= 0:
            self._loop.add_reader(self._stream, self._read)

    def _take(self) -> int:
        """Read the guest's output, keep all or a part of it, and return its number of bytes."""
        try:
            chunk = self._stream.recv(_TAIL_BYTES)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            self._loop.remove_reader(self._stream)
            return 0
        self._tail += chunk
        del self._tail[:-_TAIL_BYTES]
        if self._log.tell() + len(chunk) > _FILE_BYTES or self._times.tell() > _TIMES_BYTES:
            for file in (self._log, self._times):
                file.seek(0)
                file.truncate()
            self._noted_at_s = 0.0
            self._note_time()
            self._log.write(self._tail)
        else:
            self._note_time()
            self._log.write(chunk)
        self.grew.set()
        return len(chunk)

    def _note_time(self) -> None:
        now_s = time.time()
        if not 0 <= now_s - self._noted_at_s < _TIMES_APART_S:
            self._times.write(f"{self._log.tell()} {now_s:.3f}\n".encode())
            self._noted_at_s = now_s

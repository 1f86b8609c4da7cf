"""The guest's console: its last output in memory, and in a file of limited size."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from hypervisor.printable import printable
from hypervisor.process import LINE_LIMIT

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

_TAIL_BYTES = 64 * 1024
_FILE_BYTES = 1024 * 1024


class Console:
    """The reader of one guest's console.

    QEMU writes to a socket rather than to a file. The reader holds back a guest that floods its console, so
    the host's disk never fills up, and each new line is an event.

    :param log: the file that keeps a copy; it never grows over 1 MiB, and always holds the newest output.
    :param handover: closes QEMU's end of the socket once QEMU has inherited it.
    :raises OSError: if the file cannot be made.
    """

    def __init__(self, log: Path, *, handover: ExitStack) -> None:
        self._log = log.open("wb", buffering=0)
        self._stream, qemu_end = socket.socketpair()
        handover.enter_context(qemu_end)
        self.qemu_fd = qemu_end.fileno()
        self._stream.settimeout(0)
        self._tail = bytearray()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._stream, self._read)
        self.grew = asyncio.Event()
        """Set whenever output arrives. Clear it before waiting for it."""

    def tail(self, lines: int) -> list[str]:
        """Return the last lines, safe to print.

        :param lines: how many at most.
        """
        text = self._tail.decode(errors="replace").replace("\r", "\n")
        shown = [line for each in text.split("\n") if (line := printable(each, limit=LINE_LIMIT))]
        return shown[-lines:] if lines > 0 else []

    def close(self) -> None:
        """Read what is still buffered, then close the stream and the file. May be called repeatedly."""
        if self._stream.fileno() < 0:
            return
        self._read()
        self._loop.remove_reader(self._stream)
        self._stream.close()
        self._log.close()

    def _read(self) -> None:
        try:
            chunk = self._stream.recv(_TAIL_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            self._loop.remove_reader(self._stream)
            return
        self._tail += chunk
        del self._tail[:-_TAIL_BYTES]
        if self._log.tell() + len(chunk) > _FILE_BYTES:
            self._log.seek(0)
            self._log.truncate()
            chunk = bytes(self._tail)
        self._log.write(chunk)
        self.grew.set()

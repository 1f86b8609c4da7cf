"""The daemon's log: lines on standard error, which is containerd's FIFO; writing never blocks.

The last lines are also kept in a file beside the sandbox's state, for ``hako logs``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from shim.override import override
from shim.telemetry import latency

if TYPE_CHECKING:
    from pathlib import Path

KEPT_NAME = "shim.log"
CONSOLE_NAME = "console.log"  # so the hypervisor calls it
OUTPUT_LOGGER = "hypervisor.output"
"""The output of QEMU and the daemons: kept, and sent to containerd at debug level."""

PIPE_BYTES = 1 << 20
"""Room for lines that a busy containerd has not read yet; the kernel's 64 KiB are few."""

_KEPT_BYTES = 256 * 1024
# A write of up to PIPE_BUF bytes is atomic; see pipe(7).
_MAX_LINE = 4096
# Their debug lines would hide the shim's: hundreds of long lines for each interface.
_VERBOSE_LIBRARIES = ("asyncio", "pyroute2")


class PipeHandler(logging.Handler):
    """Write one logfmt line per record; if the pipe is full, drop and count it.

    :param descriptor: a descriptor that does not block.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._dropped = 0
        with contextlib.suppress(OSError):  # it is no pipe, or the kernel allows no more
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    @override
    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or count it."""
        dropped = f" dropped={self._dropped}" if self._dropped else ""
        line = self.format(record).encode(errors="replace")
        ending = f"{dropped}\n".encode()
        try:
            os.write(self._descriptor, line[: _MAX_LINE - len(ending)] + ending)
        except (BlockingIOError, BrokenPipeError):
            self._dropped += 1
            latency.drop("log lines")
        else:
            self._dropped = 0


class KeptLog(logging.Handler):
    """Keep the last lines in a file, which never grows over 256 KiB.

    :param path: the file; it is made with the first line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._descriptor = -1
        self._size = 0

    @override
    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; it is lost if that fails."""
        line = f"{self.format(record)[:_MAX_LINE]}\n".encode(errors="replace")
        try:
            if self._descriptor < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o600)
                self._size = os.fstat(self._descriptor).st_size
            if self._size + len(line) > _KEPT_BYTES:
                self._forget_half()
            self._size += os.write(self._descriptor, line)
        except OSError:  # the sandbox's directory is gone, or there is no room
            return

    def _forget_half(self) -> None:
        rest = os.pread(self._descriptor, _KEPT_BYTES, self._size // 2).partition(b"\n")[2]
        os.ftruncate(self._descriptor, 0)
        self._size = os.write(self._descriptor, rest)

    @override
    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()


class LogfmtFormatter(logging.Formatter):
    """``time=... level=... msg="..."``, the format of containerd and its own shims."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}: {self.formatException(record.exc_info)}"
        time = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        quoted = message.replace("\\", "\\\\").replace('"', '\\"')
        # Guests and clients choose parts of messages, and logs are read on terminals.
        quoted = "".join(
            mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in quoted
        )
        return f'time="{time}" level={record.levelname.lower()} msg="{quoted}" logger={record.name}'


def files(directory: Path) -> dict[str, Path]:
    """Name the files with the log lines of a sandbox, by their content.

    :param directory: its state directory.
    """
    return {"log": directory / KEPT_NAME, "console": directory / CONSOLE_NAME}


def configure(level: str, *, descriptor: int = 2, kept_in: Path | None = None) -> None:
    """Send all logging to standard error.

    :param level: the lowest level that is written: ``debug``, ``info``, ``warning`` or ``error``.
    :param descriptor: standard error, which ``start`` made non-blocking.
    :param kept_in: the directory in which the last lines are kept, too.
    """
    handlers: list[logging.Handler] = [PipeHandler(descriptor)]
    handlers[0].setLevel(level.upper())
    if kept_in is not None:
        handlers.append(KeptLog(kept_in / KEPT_NAME))
        logging.getLogger(OUTPUT_LOGGER).setLevel(logging.DEBUG)
    for handler in handlers:
        handler.setFormatter(LogfmtFormatter())
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    for library in _VERBOSE_LIBRARIES:
        logging.getLogger(library).setLevel(max(logging.INFO, logging.getLogger().level))

"""The daemon's log: lines on standard error, which is containerd's FIFO; a write never waits."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime

from shim.override import override

# A write of up to PIPE_BUF bytes is done whole or not at all; see pipe(7).
_MAX_LINE = 4096
# Their debug lines would bury the shim's: hundreds of long lines for each interface.
_VERBOSE_LIBRARIES = ("asyncio", "pyroute2")


class PipeHandler(logging.Handler):
    """Write one logfmt line per record; without a reader, drop and count it.

    :param descriptor: where to; it does not block.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._dropped = 0

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
        else:
            self._dropped = 0


class LogfmtFormatter(logging.Formatter):
    """``time=... level=... msg="..."``, as containerd and its own shims write."""

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


def configure(level: str, *, descriptor: int = 2) -> None:
    """Send all logging to standard error.

    :param level: the lowest level that is written: ``debug``, ``info``, ``warning`` or ``error``.
    :param descriptor: standard error, which ``start`` made non-blocking.
    """
    handler = PipeHandler(descriptor)
    handler.setFormatter(LogfmtFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in _VERBOSE_LIBRARIES:
        logging.getLogger(library).setLevel(max(logging.INFO, logging.getLogger().level))

"""A node's journal of starts and failures: one line for each, which outlives the sandbox.

Every shim appends to the same file, and a monitor that reads it also knows of earlier events. Once the file
is long, it is kept beside a new one until that one is long, too.
"""

from __future__ import annotations

import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from shim.host import file_lock, private_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

NAME = "starts.journal"
MOST_BYTES = 4 << 20  # some ten thousand starts
_LOCK_S = 0.1


class Journal:
    """Where the shims of one node write.

    :param log_dir: the directory.
    """

    def __init__(self, log_dir: Path) -> None:
        self.path = log_dir / NAME
        #: By the first line of a file, because inode numbers are reused.
        self._read_up_to: dict[bytes, int] = {}

    def note(self, kind: str, entry: Mapping[str, object]) -> None:
        """Append an entry; a failure is logged.

        :param kind: the kind of event.
        :param entry: its other fields.
        """
        line = json.dumps({"kind": kind, "at_s": time.time(), **entry}).encode() + b"\n"
        try:
            private_directory.make(str(self.path.parent))
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line)
                if os.fstat(descriptor).st_size > MOST_BYTES:
                    self._begin_anew(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.warning("journal: %s: %s: %s; metrics lack it", self.path, kind, error.strerror)

    def _begin_anew(self, descriptor: int) -> None:
        # Another shim may be doing it already; if it hangs, the file just stays long.
        if not file_lock.take(descriptor, timeout_s=_LOCK_S):
            return
        if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
            self.path.rename(self._older)

    @property
    def _older(self) -> Path:
        return self.path.with_suffix(".journal.old")

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield each entry that this object has not yielded before, without torn lines."""
        seen: dict[bytes, int] = {}
        for path in (self._older, self.path):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                continue
            with file:
                first = file.readline()
                if first in seen or not first.endswith(b"\n"):  # it has just been renamed or created
                    continue
                seen[first] = self._read_up_to.get(first, 0)
                file.seek(seen[first])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    seen[first] += len(line)
                    entry = _decoded(line)
                    if entry is not None:
                        yield entry
        self._read_up_to = seen


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None

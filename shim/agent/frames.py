"""A stream in frames: a size (u32, big-endian), then that many bytes; an empty frame is the end.

The end is part of the stream because some channels to a guest cannot tell a closed half from a lost
connection.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

WORD = struct.Struct(">I")
END = WORD.pack(0)


class StreamFrameError(Exception):
    """There are bytes after the end of the stream."""


class Unframer:
    """Decodes frames as their bytes arrive, in any pieces; it keeps no bytes, so frames may be large."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self.ended = False

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """Yield the contents of the stream's next bytes, in order and without copying them.

        :param data: the bytes that arrived.
        :raises StreamFrameError: if some of them follow the end.
        """
        rest = memoryview(data)
        while rest:
            if self.ended:
                raise StreamFrameError(f"{len(rest)} bytes after the end")
            if self._left:
                yield rest[: self._left]
                carried = min(self._left, len(rest))
                self._left -= carried
                rest = rest[carried:]
                continue
            missing = WORD.size - len(self._head)
            self._head += rest[:missing]
            rest = rest[missing:]
            if len(self._head) == WORD.size:
                (self._left,) = WORD.unpack(self._head)
                self._head = b""
                self.ended = self._left == 0


def framed(data: bytes) -> bytes:
    """Make a frame of at least one byte."""
    return WORD.pack(len(data)) + data

"""Wait until files change, see inotify(7), for which Python's library has no function."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

_MODIFY, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF = 0x2, 0x80, 0x100, 0x200, 0x400
_NAMES = _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF
_BUFFER = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Reports changes in directories; for one task, in a running event loop."""

    def __init__(self) -> None:
        self._descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "inotify")
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._changed.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def add(self, directory: Path, *, contents: bool = False) -> bool:
        """Also watch a directory; a second call does nothing.

        :param contents: also watch for writes to its files.
        :returns: False if it does not exist.
        """
        mask = _NAMES | _MODIFY if contents else _NAMES
        return bool(_libc.inotify_add_watch(self._descriptor, os.fsencode(directory), mask) >= 0)

    async def changed(self) -> None:
        """Wait for a change since the last return of this method, or since the watch began."""
        await self._changed.wait()
        self._changed.clear()
        # The loop may have called back again after the changes were read.
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, _BUFFER)

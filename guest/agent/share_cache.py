"""Keeps the guest from remembering more files of the share than the host's file server may have open.

The server has a descriptor open for each file that the guest's kernel remembers. Past its limit it fails
every request, and the kernel then takes away what is mounted below a name that it cannot look up any more. So
the kernel is told to forget before that. No event says how many files it remembers: they are counted now and
then, the more seldom the more the server may have open.
"""

from __future__ import annotations

import _thread
import time

from guest.agent import files
from guest.agent.console import log

_COUNT = "/sys/kernel/slab/fuse_inode/objects"
_DROP, _NAMES_AND_INODES = "/proc/sys/vm/drop_caches", "2"  # Documentation/admin-guide/sysctl/vm.rst
_FILES_OF_A_SECOND = 50_000
"""How many a guest is taken to look up at most. An assumption: nothing but emulation was tried."""
_LEAST_S, _MOST_S = 0.05, 10.0
_AMPLE = 200_000
"""A server that may open as many has enough for all files that a guest of usual size can have open."""
_MOST_OPEN = "/proc/sys/fs/file-max"
_SHARE_OF_OPEN_FILES = 3
"""A file that is open in the guest is not forgotten, and the server has two descriptors for it."""

_lock = _thread.allocate_lock()
_limit = 0


def keep_below(limit: int) -> None:
    """Have the kernel remember fewer files of the share than this, from now on.

    :param limit: how many the server may have open.
    """
    global _limit
    with _lock:
        is_running, _limit = bool(_limit), limit
    if limit < _AMPLE:
        files.write(_MOST_OPEN, f"{limit // _SHARE_OF_OPEN_FILES}")
    if not is_running:
        _thread.start_new_thread(_keep, ())


def interval_s(remembered: int, limit: int) -> float:
    """Return when to count again: before the kernel can remember half as many files as the server may open.

    :param remembered: how many it remembers now.
    :param limit: how many the server may have open.
    """
    return min(max((limit // 2 - remembered) / _FILES_OF_A_SECOND, _LEAST_S), _MOST_S)


def _keep() -> None:
    while True:
        try:
            remembered = int(files.read(_COUNT).split()[0])
            if remembered > _limit // 2:
                files.write(_DROP, _NAMES_AND_INODES)
                remembered = 0
        except OSError as error:
            log(f"share: how many files are remembered cannot be told: {error}")
            return
        time.sleep(interval_s(remembered, _limit))

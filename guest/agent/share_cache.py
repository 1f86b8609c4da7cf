"""Limits the files of the share that the guest remembers to those that the host's file server may open.

The server has a descriptor open for each file that the guest's kernel remembers. Past its limit, it fails
every request. The kernel then can no longer look up names, and removes mounts below them. So this module lets
the kernel forget files in time. No event says how many files it remembers, so the module counts them at
intervals, which are longer if the server may have more files open.
"""

from __future__ import annotations

import _thread
import os
import time

from guest.agent import files
from guest.agent.console import log
from proto.extensions import most_open_in_guest

_COUNT = "/sys/kernel/slab/fuse_inode/objects"
_COUNT_BYTES = 4096  # sysfs gives at most a page
_DROP, _NAMES_AND_INODES = "/proc/sys/vm/drop_caches", "2"  # Documentation/admin-guide/sysctl/vm.rst
_FILES_OF_A_SECOND = 50_000
"""The most files that a guest looks up in a second: an assumption. An emulated guest managed 10,000."""
_LEAST_S, _MOST_S = 0.05, 10.0
_MOST_OPEN = "/proc/sys/fs/file-max"

_lock = _thread.allocate_lock()
_limit = 0


def keep_below(limit: int) -> None:
    """From now on, let the kernel remember fewer files of the share than this.

    :param limit: how many the server may have open.
    """
    global _limit
    with _lock:
        is_running, _limit = bool(_limit), limit
    most = most_open_in_guest(limit)
    if most is not None:
        files.write(_MOST_OPEN, f"{most}")
    if not is_running:
        _thread.start_new_thread(_keep, ())


def interval_s(remembered: int, limit: int) -> float:
    """Return when to count again: before the kernel remembers half of the limit, at the assumed rate.

    :param remembered: how many it remembers now.
    :param limit: how many the server may have open.
    """
    return min(max((limit // 2 - remembered) / _FILES_OF_A_SECOND, _LEAST_S), _MOST_S)


def _keep() -> None:
    try:
        # Kept open: with a new descriptor for each count, an idle guest took 1.2 % of an emulated processor
        # instead of 0.7 %.
        count = os.open(_COUNT, os.O_RDONLY | os.O_CLOEXEC)
        while True:
            remembered = int(os.pread(count, _COUNT_BYTES, 0).split()[0])
            if remembered > _limit // 2:
                files.write(_DROP, _NAMES_AND_INODES)
                remembered = 0
            time.sleep(interval_s(remembered, _limit))
    except OSError as error:
        log(f"share: cannot count the files that are remembered: {error}")

"""A lock on an open file, which is waited for only so long: its holder may be stopped, or hang."""

from __future__ import annotations

import fcntl
import time

_RETRY_S = 0.005


def take(descriptor: int, kind: int = fcntl.LOCK_EX, *, timeout_s: float) -> bool:
    """Lock an open file; the calling thread waits meanwhile.

    :param descriptor: of the file. The lock is released when the last copy of it is closed.
    :param kind: ``LOCK_SH`` or ``LOCK_EX`` of flock(2).
    :param timeout_s: how long to wait for others, in seconds; with 0, only once is tried.
    :returns: whether the file is locked now.
    :raises OSError: if its file system has no locks.
    """
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            # flock(2) has no deadline, and no event tells that a lock is free.
            if time.monotonic() >= give_up_at:
                return False
            time.sleep(_RETRY_S)
        else:
            return True

"""A lock on an open file with a deadline, because its holder may be stopped, or hang."""

from __future__ import annotations

import fcntl
import time

_RETRY_S = 0.005


def take(descriptor: int, kind: int = fcntl.LOCK_EX, *, timeout_s: float) -> bool:
    """Lock an open file; the calling thread waits meanwhile.

    :param descriptor: the file's. The lock is released when its last copy is closed.
    :param kind: ``LOCK_SH`` or ``LOCK_EX`` of flock(2).
    :param timeout_s: how long to wait for other holders, in seconds; 0 means one attempt.
    :returns: whether the file is locked now.
    :raises OSError: if its file system has no locks.
    """
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            # flock(2) has no deadline, and the release of a lock is no event.
            if time.monotonic() >= give_up_at:
                return False
            time.sleep(_RETRY_S)
        else:
            return True

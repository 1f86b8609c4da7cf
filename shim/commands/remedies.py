"""What to do about an error of the host."""

from __future__ import annotations

import errno
import os


def remedy(error: OSError, usual: str) -> str:
    """Choose the remedy for an error.

    :param error: the error.
    :param usual: the remedy, if it is not that the user may not do this.
    """
    is_forbidden = error.errno in {errno.EACCES, errno.EPERM} and os.geteuid() != 0
    return "run this as root" if is_forbidden else usual

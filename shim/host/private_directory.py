"""Directories that only the shim's own user may write in, with any umask."""

from __future__ import annotations

import errno
import os
import stat

_MOST_ATTEMPTS = 100
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make(path: str) -> None:
    """Make a directory of mode 0700 and its missing parents, or accept an existing one.

    :param path: an absolute path.
    :raises PermissionError: if it exists, and another user owns it or may write in it.
    :raises OSError: if it cannot be made.
    """
    for attempts_left in reversed(range(_MOST_ATTEMPTS)):
        try:
            _make(path)
        except FileNotFoundError:  # another process has just removed it or a parent
            if not attempts_left:
                raise
        else:
            return


def _make(path: str) -> None:
    missing = []
    above = path
    while not os.path.lexists(above):
        missing.append(above)
        above = os.path.dirname(above)
    for each in reversed(missing):
        try:
            os.mkdir(each, 0o700)
        except FileExistsError:  # another shim was faster
            continue
        os.chmod(each, 0o700)  # the umask has removed bits
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_MAY_WRITE:
        raise PermissionError(
            errno.EPERM, "others own it or may write in it: chown it to root, and chmod it to 0700", path
        )

"""A file without a name, on a disk: it disappears when the last process that has it open ends."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from shim.host import private_directory
from shim.host.mount_table import MountTable

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})


def make(directory: str) -> int:
    """Make a file that only root can read, and that has no path.

    :param directory: its directory, which is made if it is missing.
    :returns: its descriptor, the caller's to close.
    :raises OSError: if it cannot be made, or the directory is in memory.
    """
    private_directory.make(directory)
    descriptor = _make(directory)
    try:
        kind = MountTable.read().locate(descriptor).mount.fstype
        if kind in _IN_MEMORY:
            raise OSError(errno.EINVAL, f"is in memory ({kind}); choose a directory on a disk", directory)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make(directory: str) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR}:
            raise
    path = Path(directory, secrets.token_hex(16))
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    path.unlink()
    return descriptor

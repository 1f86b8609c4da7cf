"""Opens a directory as a mount without a parent, for a process that must not get out of it.

A root file system of its own does not confine a process that has a directory outside of it open: from there,
``..`` leads to the host's root. A mount that is attached nowhere has nothing above it.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SYS_OPEN_TREE = 428
_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1

_libc = ctypes.CDLL(None, use_errno=True)


def open_alone(directory: Path) -> int:
    """Open a directory as a mount of its own, which ends with the last descriptor of it; see open_tree(2).

    :param directory: the directory.
    :returns: the descriptor, good for paths only.
    :raises OSError: if it is not there, or the caller may not mount.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    descriptor: int = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(directory), flags)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(directory))
    return descriptor

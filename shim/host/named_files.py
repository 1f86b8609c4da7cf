"""Files of the host that a client names: they may be of any kind, and their file system may hang.

Opening a FIFO waits until somebody writes to it, opening a device may have an effect, and the server of a
network file system may be gone. None of this may stop the shim.
"""

from __future__ import annotations

import errno
import os
import stat

_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "FIFO",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
}


def kind_of(mode: int) -> str:
    """Name the kind of a special file.

    :param mode: as stat(2) tells it.
    """
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def open_regular(path: str, flags: int = os.O_RDONLY, *, or_disk: bool = False) -> int:
    """Open a regular file, and nothing else, without waiting.

    :param path: its path.
    :param flags: of open(2).
    :param or_disk: accept a block device, too.
    :returns: a descriptor.
    :raises OSError: if there is none, or it is something else; ``strerror`` says what.
    :raises ValueError: if no file can have the path.
    """
    # With O_PATH, a file is found but not opened: see open(2). From then on, it cannot be exchanged for
    # another.
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(found).st_mode
        if not (stat.S_ISREG(mode) or (or_disk and stat.S_ISBLK(mode))):
            wanted = "neither a file nor a block device" if or_disk else "not a regular file"
            raise OSError(errno.EINVAL, f"a {kind_of(mode)}, {wanted}", path)
        return os.open(f"/proc/self/fd/{found}", flags | os.O_CLOEXEC)
    finally:
        os.close(found)


def read_regular(path: str, *, at_most: int | None = None) -> bytes:
    """Read a regular file, and nothing else, without waiting for another process.

    :param path: its path.
    :param at_most: how much of it, in bytes; ``None`` for all.
    :raises OSError: if it cannot be read, or is something else.
    :raises ValueError: if no file can have the path.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(-1 if at_most is None else at_most)

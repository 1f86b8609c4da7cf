"""Small files read and written in one system call, without the text layer or pathlib."""

from __future__ import annotations

import errno
import os


def read(path: str) -> str:
    """Read a small file whole.

    :param path: the file.
    :returns: its text.
    :raises OSError: if it cannot be read.
    """
    return read_bytes(path).decode(errors="replace")


def read_bytes(path: str) -> bytes:
    """Read a file whole.

    :param path: the file.
    :returns: its content.
    :raises OSError: if it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def open_path(path: str) -> int:
    """Open a file of any kind by a path that contains no link.

    :param path: an absolute path.
    :returns: a descriptor, as O_PATH of open(2) makes it.
    :raises OSError: if there is none, or a link is on the way (ELOOP).
    """
    here = os.open("/", os.O_PATH | os.O_CLOEXEC)
    for name in path.split("/"):
        if name in {"", "."}:
            continue
        try:
            there = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
        finally:
            os.close(here)
        here = there
        if name == ".." or os.fstat(here).st_mode & 0o170000 == 0o120000:
            os.close(here)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return here


def write(path: str, text: str) -> None:
    """Write text to an existing file in one write, as the kernel's control files require.

    :param path: the file.
    :param text: what to write.
    :raises OSError: if it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def create(path: str, text: str, *, mode: int = 0o644) -> None:
    """Replace a file's content.

    :param path: the file.
    :param text: its content.
    :param mode: permission bits of a new file.
    :raises OSError: if it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        view = memoryview(text.encode())
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def exists(path: str) -> bool:
    """Tell whether a path exists.

    :param path: the path.
    :returns: whether stat(2) succeeds.
    """
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def make_directories(path: str, *, mode: int = 0o755) -> None:
    """Make a directory and its parents where they are missing.

    :param path: the directory.
    :param mode: permission bits of new ones.
    :raises OSError: if one cannot be made.
    """
    os.makedirs(path, mode=mode, exist_ok=True)


def remove_tree(path: str) -> None:
    """Remove a directory and everything in it, leaving mounted filesystems alone.

    :param path: the directory; nothing happens if it is missing.
    :raises OSError: if something cannot be removed, such as a mount point.
    """
    try:
        device = os.lstat(path).st_dev
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif entry.stat(follow_symlinks=False).st_dev == device:
            remove_tree(entry.path)
    os.rmdir(path)

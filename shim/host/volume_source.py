"""Volumes' sources: the way to one, which does not follow the links that a guest made.

What a guest may write in, it may also put symbolic links in, and exchange at any moment: one on the way to
another container's volume would have that lead to any file of the host. Hence a path is walked step by step,
each step from the descriptor of the one before, and what was found is mounted by descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from shim.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LINKS_AT_MOST = 40  # MAXSYMLINKS of the kernel, see path_resolution(7)
_REMEDY = "name a file or directory"
_KINDS = {
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "FIFO",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
}


class GuestWritable:
    """The directories of the host that a sandbox's guest may write in, once or still."""

    def __init__(self) -> None:
        self._directories: set[tuple[int, int]] = set()

    def add(self, descriptor: int) -> None:
        """Count an open file or directory among them, with all below it."""
        self._directories.add(identity(descriptor))

    def __contains__(self, descriptor: int) -> bool:
        """Tell whether an open directory is one of them; those below one are not."""
        return identity(descriptor) in self._directories


@contextlib.contextmanager
def opened(path: Path, writable: GuestWritable) -> Iterator[int]:
    """Find what a guest is to have of the host.

    :param path: an absolute path.
    :param writable: where links are not followed, nor steps upwards taken.
    :returns: a descriptor of a file or directory, as O_PATH of open(2) makes it, for as long as the context.
    :raises InvalidArgument: if there is none, or the way to it is not followed; the message says why.
    """
    with found(path, writable) as descriptor:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            kind = _KINDS.get(stat.S_IFMT(mode), "special file")
            raise InvalidArgument(
                f"mount: {path}: is a {kind} of the host; a guest can share files and directories"
            )
        yield descriptor


@contextlib.contextmanager
def found(path: Path | str, writable: GuestWritable) -> Iterator[int]:
    """Find a file of any kind as :func:`opened` does, for the host's own use.

    :param path: an absolute path.
    :param writable: where links are not followed, nor steps upwards taken.
    :returns: a descriptor, as O_PATH of open(2) makes it, for as long as the context.
    :raises InvalidArgument: if there is none, or the way to it is not followed; the message says why.
    """
    try:
        descriptor = _walk(path, writable)
    except OSError as error:
        raise InvalidArgument(f"mount: {path}: {error.strerror}; {_REMEDY}") from error
    except ValueError as error:  # a NUL byte
        raise InvalidArgument(f"mount: {path}: {error}; {_REMEDY}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _walk(path: Path | str, writable: GuestWritable) -> int:
    pending = str(path).split("/")[::-1]
    is_guests = False
    links = 0
    here = _step("/", None)
    try:
        while pending:
            name = pending.pop()
            if name in {"", "."}:
                continue
            if is_guests and name == "..":
                raise _not_followed(path, name)
            there = _step(name, here)
            mode = os.fstat(there).st_mode
            if stat.S_ISLNK(mode):
                try:
                    links += 1
                    if is_guests:
                        raise _not_followed(path, name)
                    if links > _LINKS_AT_MOST:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    target = os.readlink("", dir_fd=there)
                finally:
                    os.close(there)
                pending += target.split("/")[::-1]
                if not target.startswith("/"):
                    continue
                there = _step("/", None)
            os.close(here)
            here = there
            is_guests = is_guests or here in writable
    except BaseException:
        os.close(here)
        raise
    return here


@contextlib.contextmanager
def walk_down(directory: Path | int, below: str) -> Iterator[int]:
    """Find a file below a directory by a path that holds no link and does not lead upwards.

    :param directory: its path, or a descriptor of it.
    :returns: a descriptor, as O_PATH of open(2) makes it, for as long as the context.
    :raises OSError: if there is no such path.
    """
    here = os.dup(directory) if isinstance(directory, int) else os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        for name in below.split("/"):
            if name == "..":
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            if name in {"", "."}:
                continue
            there = _step(name, here)
            os.close(here)
            here = there
            if stat.S_ISLNK(os.fstat(here).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        yield here
    finally:
        os.close(here)


def _step(name: str, directory: int | None) -> int:
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def _not_followed(path: Path | str, name: str) -> InvalidArgument:
    return InvalidArgument(
        f"mount: {path}: {name!r} is a link, or leads upwards, in a directory that a guest writes in; "
        "name what it leads to"
    )


def identity(descriptor: int) -> tuple[int, int]:
    """Tell what is open: its device and its number there."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino

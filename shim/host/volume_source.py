"""Opens a volume's source on the host without following a symbolic link that a guest may have made.

The threat: a guest that may write in a directory of the host can put a symbolic link there, and can replace
files by links at any moment. If the host followed such a link on the path to another container's volume, that
container could get any file of the host.

The two sets: a directory is *guest-writable* if a guest may write in it, now or earlier; a sandbox's
:class:`GuestWritable` has these directories, but not those below them. All other directories are the
*host's*: only the host's users write there, so their links can be trusted like the path itself.

The invariant: once the path has entered a guest-writable directory, it only goes down, from one real
directory to the next; a link or ``..`` is an error. Each step starts from the descriptor of the previous
step, and the source is mounted by descriptor, never by path. So nothing can be replaced in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from shim.errors import InvalidArgument
from shim.host.named_files import kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LINKS_AT_MOST = 40  # MAXSYMLINKS of the kernel, see path_resolution(7)
_REMEDY = "name a file or directory"


class GuestWritable:
    """The directories of the host that a sandbox's guest may write in, now or earlier."""

    def __init__(self) -> None:
        self._directories: set[tuple[int, int]] = set()

    def add(self, descriptor: int) -> None:
        """Add an open file or directory; everything below it then counts as guest-writable, too."""
        self._directories.add(identity(descriptor))

    def __contains__(self, descriptor: int) -> bool:
        """Tell whether an open directory itself was added."""
        return identity(descriptor) in self._directories


@contextlib.contextmanager
def opened(path: Path, writable: GuestWritable) -> Iterator[int]:
    """Open a file or directory of the host for a guest.

    :param path: an absolute path.
    :param writable: the guest-writable directories.
    :returns: a descriptor, as O_PATH of open(2) makes it; it is closed when the context ends.
    :raises InvalidArgument: if there is no file or directory at the path, or the invariant forbids the path;
        the message says which.
    """
    with found(path, writable) as descriptor:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise InvalidArgument(
                f"mount: {path}: is a {kind_of(mode)} of the host; a guest can share files and directories"
            )
        yield descriptor


@contextlib.contextmanager
def found(path: Path | str, writable: GuestWritable) -> Iterator[int]:
    """Open a file of any kind as :func:`opened` does, for the host's own use.

    :param path: an absolute path.
    :param writable: the guest-writable directories.
    :returns: a descriptor, as O_PATH of open(2) makes it; it is closed when the context ends.
    :raises InvalidArgument: if there is no file at the path, or the invariant forbids the path; the
        message says which.
    """
    try:
        descriptor = _walk(path, writable)
    except OSError as error:
        raise InvalidArgument(f"mount: {path}: {error.strerror}; {_REMEDY}") from error
    except ValueError as error:  # a NUL byte
        raise InvalidArgument(f"mount: {str(path)!r}: has a NUL byte; {_REMEDY}") from error
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
    """Open a file below a directory by a path without links and ``..``.

    :param directory: its path, or a descriptor of it.
    :param below: the file's path in it.
    :returns: a descriptor, as O_PATH of open(2) makes it; it is closed when the context ends.
    :raises OSError: if there is no such file, or a part of the path is a link or ``..``.
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
    """Identify an open file by its device and its inode number."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino

"""Parts of the share that containers are given: each mounted once, for all that ask for it.

The kernel makes a file system of each directory in the share when it is first walked into, and another in
each mount namespace that does so. So it is walked into here, before a container has a namespace of its own.
"""

from __future__ import annotations

import _thread
import errno
import os
import stat

from guest.agent import files, kernel
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SHARE = "/run/kata-containers/shared/containers/"

_lock = _thread.allocate_lock()
_users: dict[str, int] = {}
"""How many mounts there are of each of the share's directories."""


def add(source: str, target: str) -> Callable[[], None]:
    """Mount a part of the share.

    :param source: its path. No link in it is followed: a container may have put it there.
    :param target: where to mount it.
    :returns: what unmounts it.
    :raises AgentError: if there is a link in the path.
    :raises OSError: if there is no such file, or the kernel refuses.
    """
    name = source.removeprefix(SHARE).partition("/")[0]
    with _lock:
        _users[name] = _users.get(name, 0) + 1
        try:
            _mount(source, target)
        except BaseException:
            _leave(name)
            raise

    def end() -> None:
        with _lock:
            kernel.unmount(target, flags=kernel.MNT_DETACH)
            (os.rmdir if os.path.isdir(target) else os.unlink)(target)
            _leave(name)

    return end


def _mount(source: str, target: str) -> None:
    origin = _open(source)
    try:
        if stat.S_ISDIR(os.fstat(origin).st_mode):
            files.make_directories(target)
        else:
            files.make_directories(os.path.dirname(target))
            files.create(target, "")
        kernel.mount(f"/proc/self/fd/{origin}", target, flags=kernel.MS_BIND)
    finally:
        os.close(origin)


def _open(source: str) -> int:
    here = os.open(SHARE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in source.removeprefix(SHARE).split("/"):
            there = _step(name, here)
            os.close(here)
            here = there
            if name in {"", ".", ".."} or stat.S_ISLNK(os.fstat(here).st_mode):
                raise AgentError(f"storage: {source}: {name!r} is a link, or no name; it is not followed")
    except BaseException:
        os.close(here)
        raise
    return here


def _step(name: str, directory: int) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # What says that it wants a directory has the kernel mount the file system behind it.
        return os.open(name, flags | os.O_DIRECTORY, dir_fd=directory)
    except NotADirectoryError:
        return os.open(name, flags, dir_fd=directory)


def _leave(name: str) -> None:
    _users[name] -= 1
    if _users[name]:
        return
    del _users[name]
    try:
        # The file system itself, which would keep the host's busy.
        kernel.unmount(SHARE + name, flags=kernel.MNT_DETACH)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOENT}:  # no directory, or gone with the host's
            raise

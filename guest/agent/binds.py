"""Parts of the share that containers get: each is mounted once, for all of its users.

The kernel makes a file system of a directory in the share when a path first enters it, and another one in
each mount namespace that does so. So the agent opens the path here, before a container has its own namespace.
Mounts that are made in a part later appear in every container that follows that part.
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
    from collections.abc import Callable, Iterable

SHARE = "/run/kata-containers/shared/containers"
VOLUMES = "/run/kata-containers/sandbox/volumes"
# linux/mount.h: the flags of mount_setattr(2).
_ATTRIBUTES = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 0x10, "nodiratime": 0x80}
_FOLLOWED = "shared"

_lock = _thread.allocate_lock()
_users: dict[str, int] = {}
"""The number of mounts of each directory of the share."""
_left: set[str] = set()
"""Directories without mounts, which the host may have removed."""


def add(source: str, target: str, options: Iterable[str]) -> Callable[[], None]:
    """Mount a part of the share.

    Links in the path are not followed, because a container may have put them there.

    :param source: its path in the share.
    :param target: a new name among the volumes, or a path in one that is mounted already.
    :param options: flags; and ``shared``, if its bind mounts show later mounts in it.
    :returns: the function that unmounts it.
    :raises AgentError: if there is a link in a path.
    :raises OSError: if there is no such file, or the kernel refuses.
    """
    name = source.removeprefix(f"{SHARE}/").partition("/")[0]
    with _lock:
        _users[name] = _users.get(name, 0) + 1
        try:
            tree = _mount(source, target, set(options))
        except BaseException:
            _leave(name)
            raise

    def end() -> None:
        with _lock:
            try:
                _unmount(tree)
            finally:
                os.close(tree)
                _leave(name)
            if _is_own(target):
                (os.rmdir if os.path.isdir(target) else os.unlink)(target)

    return end


def _mount(source: str, target: str, options: set[str]) -> int:
    """Mount it and return an open descriptor: its path may lead elsewhere by the time it is unmounted."""
    origin = _open(SHARE, source)
    try:
        tree = kernel.clone_mount(origin)
    finally:
        os.close(origin)
    try:
        flags = sum(_ATTRIBUTES[one] for one in _ATTRIBUTES.keys() & options)
        kernel.set_mount(tree, flags, propagation=kernel.MS_SHARED if _FOLLOWED in options else 0)
        if _is_own(target):
            files.make_directories(VOLUMES)
            if stat.S_ISDIR(os.fstat(tree).st_mode):
                os.mkdir(target)
            else:
                files.create(target, "")
        point = _open(VOLUMES, target)
        try:
            kernel.attach_mount(tree, point)
        finally:
            os.close(point)
    except BaseException:
        os.close(tree)
        raise
    return tree


def _unmount(tree: int) -> None:
    try:
        kernel.unmount(f"/proc/self/fd/{tree}", flags=kernel.MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:  # it disappeared with the file system below it
            raise


def _is_own(target: str) -> bool:
    return os.path.dirname(target) == VOLUMES


def _open(top: str, path: str) -> int:
    here = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in path.removeprefix(f"{top}/").split("/"):
            there = _step(name, here)
            os.close(here)
            here = there
            if name in {"", ".", ".."} or stat.S_ISLNK(os.fstat(here).st_mode):
                raise AgentError(f"storage: {path}: {name!r} is a link, or no name; it is not followed")
    except BaseException:
        os.close(here)
        raise
    return here


def _step(name: str, directory: int) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # Asking for a directory makes the kernel mount the file system behind it.
        return os.open(name, flags | os.O_DIRECTORY, dir_fd=directory)
    except NotADirectoryError:
        return os.open(name, flags, dir_fd=directory)


def _leave(name: str) -> None:
    _users[name] -= 1
    if not _users[name]:
        del _users[name]
        try:
            # The file system itself, which would keep the host's file system busy.
            kernel.unmount(f"{SHARE}/{name}", flags=kernel.MNT_DETACH)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOENT}:  # no directory, or gone with the host's
                raise
        _left.add(name)
    _forget()


def _forget() -> None:
    """Let the kernel forget names that the host has removed from the share: they keep its files open."""
    for name in _left - _users.keys():
        try:
            # This asks the host at once; a lookup would trust the kernel's cache for a second.
            os.mkdir(f"{SHARE}/{name}")
        except FileExistsError:
            continue
        except OSError:
            pass
        _left.discard(name)

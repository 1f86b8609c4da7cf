"""CopyFile: files the host sends by message, confined to the shared directory and to volumes in memory.

Every component is opened without following links, so a link inside cannot lead out.
"""

from __future__ import annotations

import os
import stat

from guest.agent import files
from guest.agent.errors import AgentError, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.wire import Message

ROOTS = ("/run/kata-containers/shared/containers", "/run/kata-containers/sandbox/ephemeral")
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy(request: Message, *, roots: tuple[str, ...] = ROOTS) -> None:
    """Write one chunk of a file, or make a directory or link.

    :param request: grpc.CopyFileRequest.
    :param roots: the directories that hold every target.
    :raises InvalidArgument: if the path lies outside of them.
    :raises AgentError: if the file's type cannot be copied.
    :raises OSError: if the filesystem refuses.
    """
    root = next((one for one in roots if request.path.startswith(f"{one}/")), "")
    parts = request.path.removeprefix(f"{root}/").split("/")
    if not root or any(part in {"", ".", ".."} for part in parts):
        raise InvalidArgument(f"copy: {request.path}: not a plain path below {roots[0]}; choose one there")
    files.make_directories(root)
    parent = _open_parent(root, parts[:-1], request.dir_mode & 0o7777 or 0o755)
    try:
        _write(request, parent, parts[-1])
    finally:
        os.close(parent)


def _open_parent(root: str, parts: list[str], mode: int) -> int:
    here = os.open(root, _DIRECTORY_FLAGS)
    for part in parts:
        try:
            try:
                below = os.open(part, _DIRECTORY_FLAGS, dir_fd=here)
            except FileNotFoundError:
                os.mkdir(part, mode, dir_fd=here)
                below = os.open(part, _DIRECTORY_FLAGS, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def _write(request: Message, parent: int, name: str) -> None:
    kind = stat.S_IFMT(request.file_mode) or stat.S_IFREG
    if kind == stat.S_IFDIR:
        _make_directory(request, parent, name)
    elif kind == stat.S_IFLNK:
        _remove(parent, name)
        os.symlink(request.data, name, dir_fd=parent)
        os.chown(name, request.uid, request.gid, dir_fd=parent, follow_symlinks=False)
    elif kind == stat.S_IFREG:
        _write_chunk(request, parent, name)
    else:
        raise AgentError(f"copy: {request.path}: file type {kind:#o} cannot be copied; share it instead")


def _make_directory(request: Message, parent: int, name: str) -> None:
    if not _is_there(parent, name):
        os.mkdir(name, dir_fd=parent)
    fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    os.fchmod(fd, request.file_mode & 0o7777)
    os.fchown(fd, request.uid, request.gid)
    os.close(fd)


def _write_chunk(request: Message, parent: int, name: str) -> None:
    """Collect chunks beside the target; the last one puts the file into its place, whole."""
    partial = f".{name}.partial"
    if request.offset == 0:
        _remove(parent, partial)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(partial, flags, 0o600, dir_fd=parent)
    try:
        view, offset = memoryview(request.data), request.offset
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
        if os.fstat(fd).st_size < request.file_size:
            return
        os.fchown(fd, request.uid, request.gid)
        os.fchmod(fd, request.file_mode & 0o7777)
    finally:
        os.close(fd)
    os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)


def _is_there(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _remove(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return

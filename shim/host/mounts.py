"""Mounts: the few system calls that a sandbox needs, and containerd's mount list as flags and data.

The shim runs in its own mount namespace, so its mounts disappear with its processes, and the host never sees
them. Python 3.11 has neither ``mount`` nor ``unshare``, hence ctypes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from shim.errors import Internal, InvalidArgument, ShimError
from shim.host import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from proto.containerd.types_pb2 import Mount

_T = TypeVar("_T")

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000

MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

# The system calls that open_tree(2), move_mount(2) and mount_setattr(2) describe; Linux 5.12 has them all.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1
_INERT = 2 | 4  # MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV

# mount(8) option -> (flag, whether the option clears it). Names as in mount(2).
_FLAGS: dict[str, tuple[int, bool]] = {
    "async": (16, True),
    "atime": (1024, True),
    "bind": (MS_BIND, False),
    "defaults": (0, False),
    "dev": (4, True),
    "diratime": (2048, True),
    "dirsync": (128, False),
    "exec": (8, True),
    "iversion": (1 << 23, False),
    "lazytime": (1 << 25, False),
    "mand": (64, False),
    "noatime": (1024, False),
    "nodev": (4, False),
    "nodiratime": (2048, False),
    "noexec": (8, False),
    "noiversion": (1 << 23, True),
    "nolazytime": (1 << 25, True),
    "nomand": (64, True),
    "norelatime": (1 << 21, True),
    "nostrictatime": (1 << 24, True),
    "nosuid": (2, False),
    "nosymfollow": (256, False),
    "rbind": (MS_BIND | MS_REC, False),
    "relatime": (1 << 21, False),
    "remount": (MS_REMOUNT, False),
    "ro": (MS_RDONLY, False),
    "rw": (MS_RDONLY, True),
    "strictatime": (1 << 24, False),
    "suid": (2, True),
    "symfollow": (256, True),
    "sync": (16, False),
}


_CALLERS_MISTAKES = frozenset(
    {
        errno.EINVAL,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENODEV,
        errno.ENOENT,
        errno.ENOTBLK,
        errno.ENOTDIR,
        errno.ENXIO,
    }
)


class MountOptions(NamedTuple):
    """Option strings, split as mount(2) requires."""

    flags: int
    data: str


def parse_options(options: Iterable[str]) -> MountOptions:
    """Split mount(8) options into flag bits and file system data.

    :param options: strings as containerd sends them, for example ``("ro", "lowerdir=/a:/b")``.
    :returns: the flags, and the unknown options joined by commas as data.
    """
    flags = 0
    data: list[str] = []
    for option in options:
        if option not in _FLAGS:
            data.append(option)
            continue
        bits, clears = _FLAGS[option]
        flags = flags & ~bits if clears else flags | bits
    return MountOptions(flags, ",".join(data))


def is_flag(option: str) -> bool:
    """Tell whether an option is for mount(2) itself, not for the file system."""
    return option in _FLAGS


def mount(source: str, target: Path, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system.

    :raises InvalidArgument: if there is no such source, target, file system or option.
    :raises Internal: if the kernel refuses for another reason; the message names source, target and errno.
    """
    if any("\0" in part for part in (source, str(target), fstype, data)):
        raise InvalidArgument(f"mount: {fstype or 'bind'} {source!r} on {str(target)!r}: holds a NUL byte")
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode(),
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    if result != 0:
        raise _refused(ctypes.get_errno(), f"{fstype or 'bind'} {source} on {target}")


def _refused(number: int, what: str) -> ShimError:
    kind = InvalidArgument if number in _CALLERS_MISTAKES else Internal
    return kind(f"mount: {what}: {os.strerror(number)}")


def unmount(target: Path) -> None:
    """Detach all mounts at or below ``target``, busy or not; there may be none.

    :raises Internal: if the kernel refuses.
    """
    try:
        kernel.detach_mounts(str(target.resolve()))
    except OSError as error:
        raise Internal(f"unmount: {target}: {os.strerror(error.errno or 0)}") from error


async def run_to_the_end(act: Callable[[], None]) -> None:
    """Mount or unmount in a thread, because that may wait until the host has read or written a file system.

    :param act: makes the change. A cancellation takes effect only after it, so that it is never half done.
    :raises Exception: if ``act`` raises one.
    """
    acting = asyncio.ensure_future(asyncio.to_thread(act))
    cancelled: asyncio.CancelledError | None = None
    while not acting.done():
        try:
            await asyncio.wait({acting})
        except asyncio.CancelledError as error:
            cancelled = error
    acting.result()
    if cancelled is not None:
        raise cancelled


def enter_private_namespace() -> None:
    """Give this process its own mount namespace, which still follows the host's mounts.

    The root becomes a recursive slave: later mounts on the host appear here, but mounts made here do not
    appear there.

    :raises Internal: if the kernel refuses (CAP_SYS_ADMIN is needed).
    """
    if _libc.unshare(CLONE_NEWNS) != 0:
        raise Internal(f"mount namespace: unshare: {os.strerror(ctypes.get_errno())}; root is required")
    mount("none", Path("/"), flags=MS_REC | MS_SLAVE)


def share_directory(path: Path) -> None:
    """Make ``path`` a mount whose later sub-mounts propagate into the namespaces of child processes.

    The virtio-fs daemon clones the mount namespace when it starts. Without propagation, it would never see
    the root file systems of containers, which are mounted later.

    :raises Internal: if the kernel refuses.
    """
    mount(str(path), path, flags=MS_BIND)
    mount("none", path, flags=MS_SHARED)


def bind(source: Path, target: Path, *, read_only: bool, recursive: bool) -> None:
    """Bind ``source`` on ``target``, which must exist and be of the same kind.

    :raises InvalidArgument: if one of them does not exist.
    :raises Internal: if the kernel refuses for another reason.
    """
    what = f"bind {source} on {target}"
    try:
        descriptor = os.open(source, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(error.errno or 0, what) from error
    except ValueError as error:  # a NUL byte
        raise InvalidArgument(f"mount: {what!r}: {error}") from error
    try:
        bind_opened(
            descriptor,
            target,
            read_only=read_only,
            read_only_below=read_only,
            recursive=recursive,
            follows=True,
            what=what,
        )
    finally:
        os.close(descriptor)


def bind_opened(
    source: int,
    target: Path,
    *,
    read_only: bool,
    read_only_below: bool,
    recursive: bool,
    follows: bool,
    what: str,
) -> None:
    """Bind an open file or directory; its path may have changed since.

    Set-id programs and device files that a guest makes have no effect on the host. The guest's kernel decides
    about them; the file server only needs to see them.
    A read-only mount is read-only before it is visible; see mount_setattr(2). Making it read-only
    later would not propagate: the virtio-fs daemon has its own mount namespace and would still see a writable
    mount.

    :param source: a descriptor.
    :param read_only_below: whether the mounts below it become read-only, too; otherwise they are as on the
        host.
    :param recursive: with the mounts below it.
    :param follows: with later mounts of the host below it, too, which are as writable as on the host.
    :param what: words for the error.
    :raises InvalidArgument: if ``target`` does not exist or is of another kind.
    :raises Internal: if the kernel refuses for another reason.
    """
    all_below = _AT_RECURSIVE if recursive else 0
    clone = _AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC | all_below
    tree = _mount_call(_SYS_OPEN_TREE, source, b"", clone, what=what)
    try:
        for attribute, propagation, below in (
            (_INERT, 0, all_below),
            (_MOUNT_ATTR_RDONLY if read_only else 0, 0, all_below if read_only_below else 0),
            (0, 0 if follows else MS_PRIVATE, all_below),
        ):
            if attribute or propagation:
                attributes = struct.pack("=QQQQ", attribute, 0, propagation, 0)
                _mount_call(
                    _SYS_MOUNT_SETATTR,
                    *(tree, b"", _AT_EMPTY_PATH | below, attributes, len(attributes)),
                    what=what,
                )
        _mount_call(
            _SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH, what=what
        )
    finally:
        os.close(tree)


@contextlib.contextmanager
def cloned(source: int, *, what: str) -> Iterator[int]:
    """Open a directory without the mounts below it.

    :param source: a descriptor of it.
    :param what: words for the error.
    :returns: a descriptor, which is closed when the context ends.
    :raises ShimError: if the kernel refuses.
    """
    clone = _AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = _mount_call(_SYS_OPEN_TREE, source, b"", clone, what=what)
    try:
        yield tree
    finally:
        os.close(tree)


def let_write(namespace: int, target: str, inode: tuple[int, int]) -> bool:
    """Make a mount of another mount namespace writable, because such a change does not propagate.

    :param namespace: the mount namespace, open.
    :param target: the mount point in that namespace.
    :param inode: the device and the inode number of the mounted file.
    :returns: whether that is mounted there.
    :raises Internal: if the kernel refuses.
    """

    def change() -> bool:
        try:
            kernel.enter_mount_namespace(namespace)
            status = Path(target).stat()
        except FileNotFoundError:
            return False
        if (status.st_dev, status.st_ino) != inode:
            return False
        attributes = struct.pack("=QQQQ", 0, _MOUNT_ATTR_RDONLY, 0, 0)
        _mount_call(
            _SYS_MOUNT_SETATTR,
            *(_AT_FDCWD, os.fsencode(target), 0, attributes, len(attributes)),
            what=f"make {target} writable",
        )
        return True

    return _in_own_thread(change)


def _mount_call(number: int, *arguments: int | bytes, what: str) -> int:
    # Variadic functions expect longs: a plain int would leave the upper half of a register undefined.
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        raise _refused(ctypes.get_errno(), what)
    return result


def mount_all(mounts: Iterable[Mount], target: Path) -> int:
    """Mount a container's root file system as containerd describes it.

    :param mounts: the ``rootfs`` list of CreateTaskRequest, applied in order.
    :param target: the directory to mount on; a mount's own ``target`` is a path below it.
    :returns: how many mounts were made; on an error none is left.
    :raises InvalidArgument: if a mount's target leaves ``target``.
    :raises Internal: if the kernel refuses one.
    """
    made: list[Path] = []
    try:
        for entry in mounts:
            where = _below(target, entry.target)
            _mount_entry(entry, where)
            made.append(where)
    except (Internal, InvalidArgument):
        for where in reversed(made):
            unmount(where)
        raise
    return len(made)


def _below(target: Path, path: str) -> Path:
    """Resolve a path in a root file system, where any part may be a symbolic link to anywhere."""
    root = os.path.realpath(target)
    where = Path(os.path.realpath(f"{root}/{path}")) if "\0" not in path else None
    if where is None or not where.is_relative_to(root):
        raise InvalidArgument(f"rootfs: mount target {path!r}: leaves the root file system")
    return where


def _mount_entry(entry: Mount, where: Path) -> None:
    options = parse_options(entry.options)
    fstype = "" if entry.type in {"bind", "rbind"} else entry.type
    if options.flags & MS_BIND:
        bind(
            Path(entry.source),
            where,
            read_only=bool(options.flags & MS_RDONLY),
            recursive=bool(options.flags & MS_REC),
        )
    elif len(options.data) >= os.sysconf("SC_PAGESIZE"):
        _mount_from_common_directory(entry.source, where, fstype, options)
    else:
        mount(entry.source, where, fstype, options.flags, options.data)


def _mount_from_common_directory(source: str, where: Path, fstype: str, options: MountOptions) -> None:
    """Mount an overlay whose options exceed a page, the limit of mount(2), by relative lower directories.

    A thread with its own working directory changes it, so that no other thread notices.
    """
    others = [part for part in options.data.split(",") if not part.startswith("lowerdir=")]
    lowers = "".join(part for part in options.data.split(",") if part.startswith("lowerdir="))
    layers = lowers.removeprefix("lowerdir=").split(":")
    if not all(layer.startswith("/") for layer in layers):
        raise InvalidArgument(
            f"mount: {fstype} on {where}: {len(options.data)} bytes of options without absolute lower "
            "directories; shorten them"
        )
    common = os.path.commonpath(layers)
    relative = ":".join(os.path.relpath(layer, common) for layer in layers)
    data = ",".join([*others, f"lowerdir={relative}"])

    def mount_relative() -> None:
        if _libc.unshare(CLONE_FS) != 0:
            raise Internal(f"mount: unshare: {os.strerror(ctypes.get_errno())}")
        os.chdir(common)
        mount(source, where, fstype, options.flags, data)

    _in_own_thread(mount_relative)


def _in_own_thread(act: Callable[[], _T]) -> _T:
    """Run something that changes the calling thread permanently.

    :raises ShimError: as ``act`` does.
    :raises Internal: for its OSError.
    """
    outcomes: list[_T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            outcomes.append(act())
        except (ShimError, OSError) as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="mount")
    thread.start()
    thread.join()
    for failure in failures:
        kind = InvalidArgument if isinstance(failure, InvalidArgument) else Internal
        raise kind(str(failure)) from failure
    return outcomes[0]

"""System calls that Python's library lacks, through the part of ctypes that is written in C.

The part in Python defines every type there is, when it is imported: a twentieth of the agent's start.
"""

from __future__ import annotations

import _ctypes
import os

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
MNT_DETACH = 2
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
_RB_POWER_OFF = 0x4321FEDC
_AT_FDCWD, _AT_STATX_FORCE_SYNC, _STATX_SIZE = -100, 0x2000, 0x200
_STATX_BYTES = 256
_TIMEX_BYTES = 208
# The system calls that open_tree(2), move_mount(2) and mount_setattr(2) describe.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_EMPTY_PATH, _OPEN_TREE_CLONE, _ATIME = 0x1000, 1, 0x70
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 4, 0x40
_SYSLOG_ACTION_READ_ALL, _MESSAGES_BYTES = 3, 1 << 18


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001  what ctypes makes c_int of
    _type_ = "i"


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001  as above
    _type_ = "L"


class _Char(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001  as above
    _type_ = "c"


class _Messages(_ctypes.Array):  # type: ignore[type-arg]  # not subscriptable when it runs
    _type_ = _Char
    _length_ = _MESSAGES_BYTES


class _Status(_ctypes.Array):  # type: ignore[type-arg]  # as above
    _type_ = _Char
    _length_ = _STATX_BYTES


class _Timex(_ctypes.Array):  # type: ignore[type-arg]  # as above
    _type_ = _Char
    _length_ = _TIMEX_BYTES


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


def _libc(name: str) -> _Function:
    return _Function(_ctypes.dlsym(_program, name))


_program = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]  # the program itself
_mount, _umount2, _init_module = _libc("mount"), _libc("umount2"), _libc("init_module")
_unshare, _setns, _syncfs = _libc("unshare"), _libc("setns"), _libc("syncfs")
_klogctl, _reboot, _malloc_trim = _libc("klogctl"), _libc("reboot"), _libc("malloc_trim")
_statx, _adjtimex, _syscall = _libc("statx"), _libc("adjtimex"), _libc("syscall")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(source: str, target: str, *, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Attach a filesystem, see ``man 2 mount``.

    :param source: device, directory or tag.
    :param target: where to.
    :param fstype: filesystem type; empty for bind, move and propagation changes.
    :param flags: MS_* bits.
    :param data: the filesystem's own options, joined by commas.
    :raises OSError: if the kernel refuses; the error's file is the target.
    """
    result = _mount(
        source.encode(),
        target.encode(),
        fstype.encode() or None,
        _Long(flags),
        data.encode() or None,
    )
    _check(result, target)


def unmount(target: str, *, flags: int = 0) -> None:
    """Unmount a filesystem, see umount2(2).

    :param target: mount point.
    :param flags: MNT_* bits.
    :raises OSError: if the kernel refuses.
    """
    _check(_umount2(target.encode(), flags), target)


def clone_mount(fd: int) -> int:
    """Make a mount of a file or directory alone, mounted nowhere yet, see open_tree(2).

    :param fd: the file or directory.
    :returns: the mount, open.
    :raises OSError: if the kernel refuses.
    """
    flags = _AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC
    result = int(_syscall(_Long(_OPEN_TREE), _Long(fd), b"", _Long(flags)))
    _check(result, "open_tree")
    return result


def set_mount(tree: int, flags: int, *, propagation: int) -> None:
    """Give a mount more flags and another propagation, see mount_setattr(2).

    :param tree: the mount.
    :param flags: MOUNT_ATTR_* bits.
    :param propagation: one of the MS_* bits for that; 0 leaves it.
    :raises OSError: if the kernel refuses.
    """
    cleared = _ATIME if flags & _ATIME else 0
    fields = b"".join(field.to_bytes(8, "little") for field in (flags, cleared, propagation, 0))
    arguments = (_Long(tree), b"", _Long(_AT_EMPTY_PATH), fields, _Long(len(fields)))
    _check(_syscall(_Long(_MOUNT_SETATTR), *arguments), "mount_setattr")


def attach_mount(tree: int, target: int) -> None:
    """Mount what :func:`clone_mount` made, see move_mount(2).

    :param tree: the mount.
    :param target: the file or directory to mount it on, open.
    :raises OSError: if the kernel refuses.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _check(_syscall(_Long(_MOVE_MOUNT), _Long(tree), b"", _Long(target), b"", _Long(flags)), "move_mount")


def load_module(name: str, code: bytes, *, parameters: str = "") -> None:
    """Load a kernel module, see init_module(2); one that is already loaded is left alone.

    :param name: names it in the error.
    :param code: its uncompressed object.
    :param parameters: its settings, with spaces between.
    :raises OSError: if the kernel refuses it.
    """
    try:
        _check(_init_module(code, _Long(len(code)), parameters.encode()), name)
    except FileExistsError:
        return


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces, see ``man 2 unshare``.

    :param flags: CLONE_NEW* bits.
    :raises OSError: if the kernel refuses.
    """
    _check(_unshare(flags), "namespace")


def enter(namespace: str) -> None:
    """Move the calling thread into a namespace, see setns(2).

    :param namespace: a file that stands for it.
    :raises OSError: if the kernel refuses.
    """
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_setns(fd, 0), namespace)
    finally:
        os.close(fd)


def sync_filesystem(path: str) -> None:
    """Write back the dirty pages of the filesystem that holds a path, see syncfs(2).

    :param path: any file or directory of it.
    :raises OSError: if it cannot be opened or written back.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_syncfs(fd), path)
    finally:
        os.close(fd)


def ask_size(path: str) -> None:
    """Have a filesystem of another host say how large a file is now, whatever it said before, see statx(2).

    :param path: the file.
    :raises OSError: if it is gone.
    """
    result = _statx(_AT_FDCWD, path.encode(), _AT_STATX_FORCE_SYNC, _STATX_SIZE, _Status())
    _check(result, path)


def messages() -> bytes:
    """Read the kernel's log, see syslog(2).

    :returns: its newest lines, each with its level and its time.
    :raises OSError: if the kernel refuses.
    """
    buffer = _Messages()
    length = _klogctl(_SYSLOG_ACTION_READ_ALL, buffer, _MESSAGES_BYTES)
    _check(length, "log")
    return bytes(buffer)[:length]


def adjust_clock(request: bytes) -> None:
    """Change the system's clock or its rate, see adjtimex(2).

    :param request: a ``struct timex``, or the beginning of one.
    :raises OSError: if the kernel refuses.
    """
    buffer = _Timex()
    view = memoryview(buffer).cast("B")
    view[: len(request)] = request
    _check(_adjtimex(_ctypes.byref(buffer)), "clock")


def release_heap() -> None:
    """Give the heap's free pages back to the kernel, see malloc_trim(3)."""
    _malloc_trim(_Long(0))


def power_off() -> None:
    """Write everything back and switch the machine off, see reboot(2).

    :raises OSError: if the kernel refuses.
    """
    os.sync()
    _check(_reboot(_RB_POWER_OFF), "power")

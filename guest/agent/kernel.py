"""System calls that Python's library lacks, through the part of ctypes that is written in C.

The Python part defines all types on import, which takes a twentieth of the agent's start.
"""

from __future__ import annotations

import _ctypes
import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
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
_SPAWN_SETSIGDEF, _SPAWN_SETSIGMASK, _SPAWN_SETSID = 0x04, 0x08, 0x80
_SPAWN_STATE_BYTES = 512  # more than either of the C library's two structures has
_EVERY_SIGNAL = b"\xff" * 128
_ARGUMENTS_BYTES = 1 << 14
_SYS_OPENAT2, _RESOLVE_IN_ROOT = 437, 0x10


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


class _Arguments(_ctypes.Array):  # type: ignore[type-arg]  # as above
    _type_ = _Char
    _length_ = _ARGUMENTS_BYTES


class _SpawnState(_ctypes.Array):  # type: ignore[type-arg]  # as above
    _type_ = _Char
    _length_ = _SPAWN_STATE_BYTES


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
    """Clone the mount of a file or directory alone, not attached anywhere yet; see open_tree(2).

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
    """Attach a mount that :func:`clone_mount` made; see move_mount(2).

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
    """Ask a remote filesystem for a file's current size, not a cached one; see statx(2).

    :param path: the file.
    :raises OSError: if it is gone.
    """
    result = _statx(_AT_FDCWD, path.encode(), _AT_STATX_FORCE_SYNC, _STATX_SIZE, _Status())
    _check(result, path)


def open_in(root: str, path: str) -> int:
    """Open a file for reading as a process with another root would, see openat2(2).

    :param root: the directory that absolute paths and links start at.
    :param path: the file.
    :returns: a descriptor; to open a FIFO or a device does not wait.
    :raises OSError: if there is no such file, or it cannot be opened.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack(
            "QQQ", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0, _RESOLVE_IN_ROOT
        )
        fd: int = _syscall(_Long(_SYS_OPENAT2), directory, path.encode(), how, _Long(len(how)))
        _check(fd, path)
        return fd
    finally:
        os.close(directory)


_spawn, _spawn_init = _libc("posix_spawn"), _libc("posix_spawnattr_init")
_spawn_flags, _spawn_defaults = _libc("posix_spawnattr_setflags"), _libc("posix_spawnattr_setsigdefault")
_actions_init, _actions_dup2, _actions_destroy = (
    _libc(f"posix_spawn_file_actions_{name}") for name in ("init", "adddup2", "destroy")
)


def spawn(path: str, argv: list[str], environment: Mapping[str, str], stdio: Iterable[int]) -> int:
    """Start a program in its own session, with no signal ignored or blocked; see posix_spawn(3).

    ``os.posix_spawn`` cannot name signals 32 and 33, and the C library has the program ignore these unless
    they are named.

    :param path: the program.
    :param argv: its name and arguments.
    :param environment: its environment.
    :param stdio: descriptors for its 0, 1 and 2.
    :returns: its process id.
    :raises OSError: if it cannot be started.
    """
    attributes, actions = _SpawnState(), _SpawnState()
    _spawn_init(attributes)
    _spawn_flags(attributes, _SPAWN_SETSIGDEF | _SPAWN_SETSIGMASK | _SPAWN_SETSID)
    _spawn_defaults(attributes, _EVERY_SIGNAL)
    variables = [f"{name}={value}" for name, value in environment.items()]
    memory = bytearray(_ARGUMENTS_BYTES)
    start = _ctypes.addressof(_Arguments.from_buffer(memory))
    laid_out = _laid_out(argv, variables, start=start)
    memory[: len(laid_out)] = laid_out
    pid = _Int()
    _actions_init(actions)
    try:
        for number, fd in enumerate(stdio):
            _actions_dup2(actions, fd, number)
        second = _Long(start + 8 * (len(argv) + 1))
        failure = _spawn(
            _Long(_ctypes.addressof(pid)), path.encode(), actions, attributes, _Long(start), second
        )
    finally:
        _actions_destroy(actions)
    if failure:
        raise OSError(failure, os.strerror(failure), path)
    process: int = pid.value
    return process


def _laid_out(*lists: list[str], start: int) -> bytes:
    """Lay out lists of strings for C: all pointers, with a null after each list, and the strings.

    :param start: the address that the result will have.
    :raises OSError: if it is too long.
    """
    pointers, strings = [], b""
    first = start + 8 * sum(len(one) + 1 for one in lists)
    for one in lists:
        for text in one:
            pointers.append(first + len(strings))
            strings += os.fsencode(text) + b"\0"
        pointers.append(0)
    result = struct.pack(f"{len(pointers)}Q", *pointers) + strings
    if len(result) > _ARGUMENTS_BYTES:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return result


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

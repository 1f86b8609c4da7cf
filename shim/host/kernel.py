"""Linux calls for which Python has no function; ``ctypes`` is imported at the first call."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

_PR_SET_CHILD_SUBREAPER = 36
_PR_SCHED_CORE = 62
_PR_SCHED_CORE_CREATE = 1
_PIDTYPE_PGID = 2
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_ADDRESS_BYTES = 16
_TFD_TIMER_ABSTIME = 1
_TFD_TIMER_CANCEL_ON_SET = 2
_FAR_FUTURE_S = 1 << 33
_CLONE_FS = 0x00000200
_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703  # linux/nsfs.h


def become_subreaper() -> None:
    """Adopt the orphans among this process's descendants; see prctl(2).

    :raises OSError: if the kernel refuses.
    """
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def create_core_scheduling_cookie() -> None:
    """Give this process group its own core scheduling cookie; see PR_SCHED_CORE of prctl(2).

    :raises OSError: if the kernel has no core scheduling.
    """
    _call("prctl", _PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _PIDTYPE_PGID, 0)


def enter_mount_namespace(descriptor: int) -> None:
    """Move only the calling thread into a mount namespace and to its root; see setns(2).

    :param descriptor: the namespace, open.
    :raises OSError: if the kernel refuses.
    """
    _call("unshare", _CLONE_FS)
    _call("setns", descriptor, _CLONE_NEWNS)


def enter_network_namespace(descriptor: int) -> None:
    """Move only the calling thread into a network namespace; see setns(2).

    :param descriptor: the namespace, open.
    :raises OSError: if the kernel refuses.
    """
    _call("setns", descriptor, _CLONE_NEWNET)


def is_network_namespace(descriptor: int) -> bool:
    """Tell whether an open file is a network namespace; see ioctl_ns(2).

    :param descriptor: the file.
    """
    try:
        return fcntl.ioctl(descriptor, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


def enter_new_network_namespace() -> None:
    """Move only the calling thread into a new network namespace; see unshare(2).

    :raises OSError: if the kernel refuses.
    """
    _call("unshare", _CLONE_NEWNET)


def disconnect(descriptor: int) -> None:
    """Let a UDP socket forget its peer, and its port if the kernel chose that; see connect(2).

    :param descriptor: the socket.
    :raises OSError: if the kernel refuses.
    """
    _call("connect", descriptor, bytes(_ADDRESS_BYTES), _ADDRESS_BYTES)  # of the family AF_UNSPEC, 0


def open_clock_watch() -> int:
    """Watch the host's clock; see timerfd_create(2).

    :returns: a descriptor that becomes readable once, when the clock is set or the host wakes from a sleep.
    :raises OSError: if the kernel refuses.
    """
    import ctypes  # noqa: PLC0415 - as below

    descriptor: int = ctypes.CDLL(None, use_errno=True).timerfd_create(
        time.CLOCK_REALTIME, os.O_CLOEXEC | os.O_NONBLOCK
    )
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), f"timerfd_create: {os.strerror(ctypes.get_errno())}")
    setting = struct.pack("4q", 0, 0, _FAR_FUTURE_S, 0)
    try:
        _call("timerfd_settime", descriptor, _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET, setting, 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sync_file_system(descriptor: int) -> None:
    """Write a file system's data to its disk; see syncfs(2).

    :param descriptor: any file of it.
    :raises OSError: if that fails.
    """
    _call("syncfs", descriptor)


def socket_option(descriptor: int, level: int, option: int, request: bytes) -> bytes:
    """Read an option of a socket that needs a request; see getsockopt(2).

    :param request: the request, as long as the longest answer.
    :returns: the answer.
    :raises OSError: if the kernel refuses.
    """
    import ctypes  # noqa: PLC0415 - slow to import, and rarely needed

    buffer = ctypes.create_string_buffer(request, len(request))
    size = ctypes.c_uint(len(request))
    _call("getsockopt", descriptor, level, option, ctypes.byref(buffer), ctypes.byref(size))
    return buffer.raw[: size.value]


def detach_mounts(below: str) -> None:
    """Detach everything mounted at or below a path in this mount namespace, busy or not; see umount2(2).

    :param below: an absolute path without symbolic links.
    :raises OSError: if the kernel refuses.
    """
    while targets := mount_targets(below):
        target = max(targets, key=len)
        try:
            _call("umount2", os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW)
        except OSError as error:
            # Another thread, or a propagated unmount of the host's, may have been faster.
            if error.errno != errno.EINVAL or target in mount_targets(below):
                raise


def mount_targets(below: str) -> list[str]:
    """List the mount points at or below a path in this mount namespace.

    :param below: an absolute path without symbolic links.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        fields = [line.split(b" ")[4] for line in file]
    # proc(5) mountinfo writes space, tab, newline and backslash as octal escapes.
    targets = [os.fsdecode(field.decode("unicode_escape").encode("latin-1")) for field in fields]
    return [target for target in targets if target == below or target.startswith(f"{below.rstrip('/')}/")]


def _call(function: str, *arguments: object) -> None:
    import ctypes  # noqa: PLC0415 - 6 ms that most invocations do not need

    # Variadic functions expect longs: a plain int would leave the upper half of a register undefined.
    converted = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")

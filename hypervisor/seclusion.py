"""Taking the host's files away from a QEMU that has started: it needs none of them any more.

Tasks report QEMU's pid, and clients look for a container's files below ``/proc/PID/root``, as ``nerdctl cp``
does. There must be nothing to find and nothing to overwrite; not for a guest either that has taken QEMU over.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

log = logging.getLogger(__name__)

OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "--")
"""Starts a program in a mount namespace of its own, which is what can be emptied."""

# Of mount(2), umount2(2) and clone(2).
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MNT_DETACH = 2
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000

_libc = ctypes.CDLL(None, use_errno=True)


async def seclude(pid: int, place: Path) -> None:
    """Give a process a root with nothing but ``/dev/null``, and that nobody can write to.

    What the process has open stays open. If the host cannot do that, a warning says so.

    :param pid: the process; it was started with :data:`OWN_MOUNTS`.
    :param place: any directory.
    """
    # A thread of its own, for it cannot come back from where it goes.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seclusion")
    try:
        await asyncio.get_running_loop().run_in_executor(thread, _replace_root, pid, place)
    except OSError as error:
        log.warning("start vm: QEMU still sees the host's files: %s", error)
    finally:
        thread.shutdown(wait=False)


def _replace_root(pid: int, place: Path) -> None:
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", _CLONE_FS)
        _call("setns", namespace, _CLONE_NEWNS)
    finally:
        os.close(namespace)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _call("mount", b"none", os.fsencode(place), b"tmpfs", flags, b"mode=755")
    os.chdir(place)
    # Opened when the first disk is plugged, to learn which locks the kernel has.
    null = Path("dev/null")
    null.parent.mkdir()
    null.touch()
    _call("mount", b"/dev/null", b"dev/null", b"none", _MS_BIND, b"")
    _call("mount", b"none", b".", b"tmpfs", flags | _MS_REMOUNT | _MS_RDONLY, b"mode=755")
    # The new root comes to lie below the old one, which is then taken off: see pivot_root(2), NOTES.
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)


def _call(function: str, *arguments: int | bytes) -> None:
    converted = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if getattr(_libc, function)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")

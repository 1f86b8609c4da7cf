"""Takes the host's files away from a started QEMU, which no longer needs them.

Tasks report QEMU's pid, and clients look for a container's files below ``/proc/PID/root``, as ``nerdctl cp``
does. They must find nothing to read or overwrite; the same holds for a guest that has taken over QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.confinement import SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypervisor.interface import Identity, VmSpec

log = logging.getLogger(__name__)

_OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "--")
_EVERYWHERE = Path("/usr")
"""A directory that exists in the root of each confined process."""

# Of mount(2), umount2(2) and clone(2).
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MS_REC = 0x4000
_MNT_DETACH = 2
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000

_libc = ctypes.CDLL(None, use_errno=True)


def entering(spec: VmSpec) -> list[str]:
    """Begin the command line of an unconfined QEMU: its own mounts, which can be emptied, and its network.

    :param spec: its machine. If it has root ports, QEMU opens devices when they are plugged.
    """
    network = spec.network_namespace
    return [
        *(() if spec.root_ports else _OWN_MOUNTS),
        *(["nsenter", f"--net={network}", "--"] if network else []),
    ]


async def seclude(pid: int, spec: VmSpec) -> None:
    """Give a process a read-only root that holds only ``/dev/null``.

    Open files stay open. If the host cannot do that, a warning is logged.

    :param pid: the process; its mounts are its own.
    :param spec: its machine.
    """
    place = spec.directory if spec.jail is None else _EVERYWHERE
    await _inside(pid, partial(_replace_root, place))


async def show_share_only(pid: int, *, is_opened: bool) -> None:
    """Leave a confined virtio-fs daemon nothing but its share. Open files stay open.

    :param pid: the process, which serves already.
    :param is_opened: whether it has opened the share. Otherwise it finds it under its path later.
    """
    await _inside(pid, _make_share_root if is_opened else partial(_replace_root, _EVERYWHERE, share=SHARE))


async def give_devices(pid: int, spec: VmSpec, nodes: Iterable[Path]) -> None:
    """Give a confined QEMU its own device nodes of the host. An unconfined QEMU sees the host's.

    :param pid: QEMU.
    :param spec: its machine, which has root ports.
    :param nodes: their paths; nodes that it has already stay.
    :raises OSError: if one does not exist.
    """
    if spec.jail is not None:
        found = [(node, node.stat()) for node in nodes]
        await _inside(pid, partial(_make_nodes, found, spec.jail))


def _make_nodes(found: list[tuple[Path, os.stat_result]], owner: Identity) -> None:
    for node, status in found:
        node.parent.mkdir(parents=True, exist_ok=True)
        node.parent.chmod(0o755)
        with contextlib.suppress(FileExistsError):
            os.mknod(node, stat.S_IFCHR | 0o600, status.st_rdev)
            os.chown(node, owner.uid, owner.gid)


async def _inside(pid: int, change: Callable[[], None]) -> None:
    # In its own thread, because a thread cannot return from there.
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seclusion")
    try:
        await asyncio.get_running_loop().run_in_executor(thread, _in_mounts_of, pid, change)
    except OSError as error:
        log.warning("start vm: process %d still sees files that it no longer needs: %s", pid, error)
    finally:
        thread.shutdown(wait=False)


def _in_mounts_of(pid: int, change: Callable[[], None]) -> None:
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", _CLONE_FS)
        _call("setns", namespace, _CLONE_NEWNS)
    finally:
        os.close(namespace)
    change()


def _make_share_root() -> None:
    os.chdir(SHARE)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)


def _replace_root(place: Path, *, share: Path | None = None) -> None:
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _call("mount", b"none", os.fsencode(place), b"tmpfs", flags, b"mode=755")
    os.chdir(place)
    # QEMU opens it with the first disk, to learn which locks the kernel has.
    null = Path("dev/null")
    null.parent.mkdir()
    null.touch()
    _call("mount", b"/dev/null", b"dev/null", b"none", _MS_BIND, b"")
    if share is not None:
        Path(share.name).mkdir()
        # The share stays where it is as well, so that the daemon still finds it if a later step fails.
        _call("mount", os.fsencode(share), os.fsencode(share.name), b"none", _MS_BIND | _MS_REC, b"")
    _call("mount", b"none", b".", b"tmpfs", flags | _MS_REMOUNT | _MS_RDONLY, b"mode=755")
    # The old root is stacked on the new one and then unmounted: see pivot_root(2), NOTES.
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)


def _call(function: str, *arguments: int | bytes) -> None:
    converted = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if getattr(_libc, function)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")

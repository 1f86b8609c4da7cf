"""Parking: moves the memory of a stopped machine to a sealed file, and back.

QEMU, the daemons and all connections stay. The memory consists of files that QEMU holds open, so another
process can read them, and empty them page by page. Nothing may touch the memory in between: QEMU's virtual
CPUs and queues are stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import sealed_memory
from hypervisor.errors import ParkedMemoryLostError, ParkError
from hypervisor.memory_copy import data_ranges
from hypervisor.sealed_memory import Range

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from hypervisor.host_side import HostSide
    from hypervisor.process import ChildProcess

COPIER = "parking copier"

_MEMORIES = ("/memfd:memory-backend-memfd", "/memfd:hako-memory")
"""The names of guest memory: QEMU's own, and a clone's."""

_READ_AHEAD_BYTES = 64 << 20
_STEP_BYTES = 1 << 20
"""The kernel reads no more than about this for one request."""

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class ParkedMemory:
    """The memory of a parked machine.

    :param file: a descriptor of the sealed file, to be closed.
    :param key: its key, which exists nowhere else.
    :param memory_bytes: how much RAM it freed, in bytes.
    :param file_bytes: the length of the file.
    """

    file: int
    key: bytes
    memory_bytes: int
    file_bytes: int


async def write_out(host: HostSide, file: int, *, least_bytes: int) -> ParkedMemory:
    """Write the memory of a machine that stands still to a file.

    :param host: the machine's side of the host.
    :param file: an empty file; its descriptor stays the caller's to close.
    :param least_bytes: how much memory the machine has at least.
    :raises ParkError: if that fails.
    """
    with _reporting("park"):
        async with _opened(host) as memories:
            if sum(os.fstat(each).st_size for each in memories) < least_bytes:
                raise ParkError("park: this QEMU keeps its memory under another name than expected")
            ranges = await asyncio.to_thread(_ranges, memories)
            key = secrets.token_bytes(sealed_memory.KEY_BYTES)
            copier = await _copy("seal", host, file, sealed_memory.order(key, ranges), memories)
        if copier.exited.result().code != 0:
            raise ParkError(f"park: {copier.obituary()}")
        return ParkedMemory(os.dup(file), key, sum(each.length for each in ranges), int(copier.output()))


async def empty(host: HostSide) -> None:
    """Take the memory of a machine that stands still from RAM.

    :param host: the machine's side of the host.
    :raises ParkError: if that fails; a part of it may be gone.
    """
    with _reporting("park"):
        async with _opened(host) as memories:
            await asyncio.to_thread(_punch, memories)


async def put_back(host: HostSide, parked: ParkedMemory) -> None:
    """Move the memory back; after a failure, it can be tried again.

    :param host: the machine's side of the host.
    :param parked: what :func:`write_out` has returned.
    :raises ParkedMemoryLostError: if the file is not what was written: the machine can never go on.
    :raises ParkError: if that fails for another reason.
    """
    order = sealed_memory.order(parked.key, ())
    with _reporting("unpark"):
        async with _opened(host) as memories:
            copier, _ = await asyncio.gather(
                _copy("unseal", host, parked.file, order, memories),
                asyncio.to_thread(_read_ahead, parked),
            )
    status = copier.exited.result()
    if status.code == sealed_memory.LOST:
        raise ParkedMemoryLostError(f"unpark: the file of its memory: {copier.output().strip()}")
    if status.code != 0:
        raise ParkError(f"unpark: {copier.obituary()}")


async def _copy(what: str, host: HostSide, file: int, order: bytes, memories: list[int]) -> ChildProcess:
    spec = importlib.util.find_spec("cryptography")
    if spec is None or spec.origin is None:
        raise ParkError("park: Python's package cryptography is not there; install it")
    packages = str(Path(spec.origin).parent.parent)
    ordered = os.memfd_create("hako-order", os.MFD_CLOEXEC)
    try:
        os.write(ordered, order)
        descriptors = [file, ordered, *memories]
        program = [sys.executable, "-I", "-S", str(Path(sealed_memory.__file__)), what, packages]
        return await host.run(COPIER, [*program, *map(str, descriptors)], inherit=descriptors)
    finally:
        os.close(ordered)


@contextlib.asynccontextmanager
async def _opened(host: HostSide) -> AsyncIterator[list[int]]:
    """Open each memory of a machine for a block."""
    memories = await asyncio.to_thread(_open_memories, host.complete().qemu.pid)
    try:
        yield memories
    finally:
        for each in memories:
            os.close(each)


def _open_memories(pid: int) -> list[int]:
    """Open each memory of a machine once, in a fixed order.

    :param pid: of its QEMU, which may be hostile: only files that exist nowhere else are opened.
    """
    probe = os.memfd_create("hako-probe", os.MFD_CLOEXEC)
    device = os.fstat(probe).st_dev
    os.close(probe)
    found: dict[int, int] = {}
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if not str(link.readlink()).startswith(_MEMORIES):
                    continue
                opened = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                status = os.fstat(opened)
                if status.st_dev != device or status.st_ino in found:
                    os.close(opened)
                else:
                    found[status.st_ino] = opened
    except BaseException:
        for each in found.values():
            os.close(each)
        raise
    return [found[inode] for inode in sorted(found)]


def _read_ahead(parked: ParkedMemory) -> None:
    """Have the disk read the beginning of the file while the copier starts."""
    for offset in range(0, min(parked.file_bytes, _READ_AHEAD_BYTES), _STEP_BYTES):
        os.posix_fadvise(parked.file, offset, _STEP_BYTES, os.POSIX_FADV_WILLNEED)


def _ranges(memories: list[int]) -> list[Range]:
    return [
        Range(number, begin, end - begin)
        for number, memory in enumerate(memories)
        for begin, end in data_ranges(memory)
    ]


def _punch(memories: list[int]) -> None:
    for memory, offset, length in _ranges(memories):
        if _libc.fallocate(memories[memory], _KEEP_SIZE | _PUNCH_HOLE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def _reporting(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ParkError(f"{what}: {error.filename or 'memory'}: {error.strerror}") from error

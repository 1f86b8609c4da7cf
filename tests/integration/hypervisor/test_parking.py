"""The memory of a real machine goes to a file and comes back, or the machine goes on as before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import ParkedMemoryLostError, ParkError
from hypervisor.parking import COPIER
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from hypervisor import QemuHypervisor

MIB = 1 << 20
SMALL = 256 * MIB
SLACK = 4 * MIB
"""What an idle guest may use between two looks at its memory."""
ENDS_S = patient(60)


def unnamed(directory: Path) -> int:
    return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file without a name, on a disk."""
    descriptor = unnamed(tmp_path)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
async def machine(clone: Callable[..., Awaitable[Any]], qemu: Path, tmp_path: Path) -> Any:
    """A machine with a shell and a pattern in its memory."""
    vm, shell = await clone(qemu=qemu, directory=tmp_path, memory_bytes=SMALL)
    await shell("dd if=/dev/urandom of=/pattern bs=1M count=8; sha256sum /pattern >/sum")
    return vm, shell


async def check(shell: Any) -> None:
    assert await shell("sha256sum -c /sum") == "/pattern: OK"


def memories(vm: QemuHypervisor) -> dict[int, int]:
    """How much of each of the guest's memories is in RAM, in bytes."""
    found = {}
    for descriptor in Path(f"/proc/{vm.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # QEMU has closed it meanwhile
            if "memfd:" in str(descriptor.readlink()):
                status = descriptor.stat()
                found[status.st_ino] = status.st_blocks * 512
    return found


def in_ram(vm: QemuHypervisor) -> int:
    return sum(memories(vm).values())


def kill_next_copier(vm: QemuHypervisor) -> None:
    """Let the next copier be killed as soon as it has been started."""
    note = vm._host._on_process

    def note_and_kill(name: str, pid: int) -> None:
        note(name, pid)
        if name == COPIER:
            vm._host._on_process = note
            os.kill(pid, signal.SIGKILL)

    vm._host._on_process = note_and_kill


async def test_all_memory_leaves_and_comes_back_again_and_again(machine: Any, file: int, share: Path) -> None:
    vm, shell = machine
    await shell("mkdir /m; mount -t virtiofs kataShared /m; exec 5</m/from-the-host")
    await vm.resize_memory(SMALL + 128 * MIB)
    await shell("mkdir /t; mount -t tmpfs t /t; dd if=/dev/zero bs=1M count=60 | tr '\\0' 'x' >/t/large")
    assert len(memories(vm)) == 2
    for _ in range(2):
        before = in_ram(vm)
        parked = await vm.park(file)
        assert before + SLACK >= parked > 60 * MIB
        assert in_ram(vm) == 0

        await vm.unpark()

        await check(shell)
        assert await shell("tr -d x </t/large | wc -c; wc -c </t/large") == f"0\n{60 * MIB}"
    assert await shell("cat <&5; ls /m") == "hello\nfrom-the-host"
    (share / "later").touch()
    await shell.until("test -e /m/later")


async def test_a_file_that_was_changed_never_comes_back(machine: Any, file: int) -> None:
    vm, _ = machine
    await vm.park(file)
    byte = os.pread(file, 1, 3 * MIB)
    os.pwrite(file, bytes([byte[0] ^ 1]), 3 * MIB)

    with pytest.raises(ParkedMemoryLostError, match=r"^unpark: the file of its memory: record \d+: not what"):
        await vm.unpark()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=1M", "small", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(place)], check=True)


async def test_a_machine_goes_on_if_the_disk_is_full(machine: Any, small_disk: Path) -> None:
    vm, shell = machine

    full = unnamed(small_disk)
    try:
        with pytest.raises(ParkError, match="No space left on device"):
            await vm.park(full)
    finally:
        os.close(full)

    await check(shell)


async def test_a_machine_goes_on_if_the_copier_dies(machine: Any, file: int) -> None:
    vm, shell = machine
    kill_next_copier(vm)
    with pytest.raises(ParkError, match="parking copier killed by signal 9"):
        await vm.park(file)
    await check(shell)

    await vm.park(file)
    kill_next_copier(vm)
    with pytest.raises(ParkError, match="parking copier killed by signal 9"):
        await vm.unpark()
    await vm.unpark()

    await check(shell)


async def test_a_parked_machine_may_end(machine: Any, file: int) -> None:
    vm, _ = machine
    await vm.park(file)
    os.kill(vm.pid, signal.SIGKILL)

    async with asyncio.timeout(ENDS_S):
        assert (await vm.wait()).reason == "QEMU killed by signal 9"
    with pytest.raises(ParkError, match="gone"):
        await vm.unpark()


async def test_a_parked_machine_takes_no_other_orders(machine: Any, file: int) -> None:
    vm, shell = machine
    await vm.park(file)

    with pytest.raises(Exception, match="the virtual machine is parked"):
        await vm.resize_memory(SMALL + 128 * MIB)

    await vm.unpark()
    await check(shell)

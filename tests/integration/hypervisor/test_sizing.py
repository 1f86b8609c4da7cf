"""A running machine grows and shrinks, and its kernel agrees with the reported size."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Accelerator, ResizeError, ResizeRefusedError
from hypervisor.vcpus import Vcpus
from tests.patience import patient

from .conftest import ACCELERATOR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from hypervisor import QemuHypervisor

    from .guest_shell import GuestShell


MIB = 1 << 20
SMALL, LARGE = 256 * MIB, 1024 * MIB
BACK_ON_HOST_S = patient(120)

LOAD = "while true; do dd if=/dev/zero of=/load bs=1M count=16 2>/dev/null; done >/dev/null 2>&1 &"
HUNGRY = 300  # MiB that a file in the guest's memory takes: more than there would be
ALL_CPUS_ON = "for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do echo 1 >$cpu; done"


async def processors(shell: Any) -> int:
    return int(await shell("nproc"))


async def memory(shell: Any) -> int:
    return int(await shell("grep MemTotal /proc/meminfo | tr -dc 0-9")) * 1024


def on_host(vm: Any) -> int:
    """Count the bytes of the host that hold the guest's memory."""
    mapped = {}
    for fd in Path(f"/proc/{vm.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # QEMU has closed it meanwhile
            if "/memfd:" in str(fd.readlink()):
                # A clone's memory is open twice: as it was inherited, and as QEMU opened it.
                mapped[fd.stat().st_ino] = fd.stat().st_blocks * 512
    assert mapped, "QEMU has no memory"
    return sum(mapped.values())


@pytest.mark.nightly
async def test_memory_grows_and_shrinks_under_load_and_not_against_the_guests_will(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], qemu: Path
) -> None:
    vm, shell = await start(qemu=qemu, memory_bytes=SMALL)
    first = await memory(shell)
    for wrong in (SMALL // 2, 8 << 30):
        with pytest.raises(ResizeError, match="MiB: the virtual machine can have 256 to 4096 MiB;"):
            await vm.resize_memory(wrong)

    load = await shell(f"{LOAD} echo $!")
    for size in (LARGE, SMALL, LARGE // 2):
        assert await vm.resize_memory(size) == size
        assert await memory(shell) - first == size - SMALL

    await shell(f"kill {load}; rm -f /load; mount -t tmpfs -o size=90% none /mnt")
    await shell(f"dd if=/dev/zero of=/mnt/full bs=1M count={HUNGRY}")
    with pytest.raises(ResizeRefusedError, match=r"256 MiB: the guest stopped at \d+ MiB") as caught:
        await vm.resize_memory(SMALL)
    assert SMALL < caught.value.reached <= LARGE // 2
    assert await memory(shell) - first == caught.value.reached - SMALL

    await shell("rm /mnt/full")
    assert await vm.resize_memory(SMALL) == SMALL
    assert await memory(shell) == first


@pytest.mark.nightly
async def test_a_guest_without_virtio_mem_gets_memory_modules(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], qemu: Path
) -> None:
    vm, shell = await start(qemu=qemu, memory_bytes=SMALL, kernel_parameters=("module_blacklist=virtio_mem",))
    first = await memory(shell)
    assert await vm.resize_memory(SMALL + 100 * MIB) == SMALL + 128 * MIB  # a module has at least this size
    assert await memory(shell) - first == 128 * MIB
    assert await vm.resize_memory(LARGE) == LARGE
    assert await memory(shell) - first == LARGE - SMALL
    assert await vm.resize_memory(SMALL + 128 * MIB) == SMALL + 128 * MIB
    assert await vm.resize_memory(SMALL) == SMALL
    assert await memory(shell) == first


async def test_memory_that_the_guest_frees_is_back_on_the_host(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], qemu: Path
) -> None:
    vm, shell = await start(qemu=qemu, memory_bytes=LARGE)
    before = on_host(vm)
    await shell("mount -t tmpfs -o size=90% none /mnt; dd if=/dev/zero of=/mnt/full bs=1M count=512")
    assert on_host(vm) - before > 500 * MIB
    await shell("rm /mnt/full")
    deadline = time.monotonic() + BACK_ON_HOST_S
    while on_host(vm) - before > 50 * MIB:
        assert time.monotonic() < deadline, f"{(on_host(vm) - before) // MIB} MiB are still there"
        await asyncio.sleep(0.1)


async def test_processors_are_added_and_taken_away_as_the_guest_sees_it(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], qemu: Path
) -> None:
    vm, shell = await start(qemu=qemu, vcpus=1, max_vcpus=4)
    await shell(LOAD)
    for wrong in (0, 5):
        with pytest.raises(ResizeError, match=f"resize vcpus: {wrong}: the virtual machine can have 1 to 4;"):
            await vm.resize_vcpus(wrong)

    assert await vm.resize_vcpus(4) == 4
    await shell(ALL_CPUS_ON)
    assert await processors(shell) == 4
    qmp = vm._host.qmp
    assert qmp is not None
    older = (await qmp.ask(dict, "query-version"))["qemu"]["major"] < 10
    if older and ACCELERATOR is Accelerator.TCG:
        # Emulated ones stay in this QEMU, which would not survive the next device that is plugged.
        assert await vm.resize_vcpus(1) == 4

    # Removed here, too, as under KVM; it is the last change to this machine.
    vcpus = Vcpus(qmp, pid=vm.pid, boot=1, most=4, emulated=False)
    for count in (2, 1):
        assert await vcpus.resize(count) == count
        assert await processors(shell) == count
    assert await shell("cat /sys/devices/system/cpu/present") == "0"


async def test_virtual_processors_are_kept_to_processors_of_the_host(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]],
) -> None:
    # Under emulation, a machine that boots with two has one thread for both.
    vm, _ = await start(vcpus=1)
    await vm.resize_vcpus(2)

    def allowed() -> list[set[int]]:
        found = []
        for thread in Path(f"/proc/{vm.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another one, which has ended
                if (thread / "comm").read_text().startswith("CPU "):
                    found.append(os.sched_getaffinity(int(thread.name)))
        return sorted(found, key=sorted)

    everything = os.sched_getaffinity(0)
    first, second, *_ = sorted(everything)
    await vm.pin_vcpus(frozenset({first, second}))
    assert allowed() == [{first}, {second}]
    await vm.pin_vcpus(frozenset({second}))
    assert allowed() == [{second}, {second}]
    with pytest.raises(ResizeError, match=r"pin vcpus: to \[1023\]: "):
        await vm.pin_vcpus(frozenset({1023}))
    await vm.pin_vcpus(frozenset())
    assert allowed() == [everything, everything]

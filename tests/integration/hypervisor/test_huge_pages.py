"""A guest whose memory is of huge pages that the host has reserved: from the start, and where it grows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import VmStartError

from .conftest import START_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from hypervisor import QemuHypervisor
    from tests.integration.hypervisor.conftest import Machines

    from .guest_shell import GuestShell


MIB = 1 << 20
RESERVED = Path("/proc/sys/vm/nr_hugepages")
BOOTED, GROWN, MOST = 128 * MIB, 192 * MIB, 512 * MIB


def pages(which: str) -> int:
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1])


@pytest.fixture
def reserve() -> Iterator[Callable[[int], None]]:
    """Reserve so many bytes of huge pages for a test."""
    before = RESERVED.read_text()

    def reserve(size: int) -> None:
        wanted = int(before) + size // (pages("Hugepagesize") << 10)
        RESERVED.write_text(f"{wanted}\n")
        if int(RESERVED.read_text()) < wanted:
            pytest.skip("this machine's memory is too much in pieces for huge pages")

    yield reserve
    RESERVED.write_text(before)


async def test_all_memory_is_of_huge_pages(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], reserve: Callable[[int], None]
) -> None:
    reserve(GROWN)
    vm, shell = await start(memory_bytes=BOOTED, max_memory_bytes=MOST, huge_pages=True)
    used = pages("HugePages_Total") - pages("HugePages_Free")
    assert used > 0
    assert await vm.resize_memory(GROWN) == GROWN
    assert await shell("echo here") == "here"
    await vm.stop()
    assert pages("HugePages_Free") == pages("HugePages_Total")


async def test_without_enough_huge_pages_the_reason_is_named(
    machines: Machines, reserve: Callable[[int], None]
) -> None:
    reserve(0)
    vm = machines(huge_pages=True)
    with pytest.raises(VmStartError, match="Cannot allocate memory"):
        await vm.start(timeout_s=START_S)

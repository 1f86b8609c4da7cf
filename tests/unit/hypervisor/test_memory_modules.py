"""Memory modules for a QEMU without virtio-mem: the commands in their order."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import pytest

from hypervisor import ResizeError
from hypervisor.argv import MEMORY_MODULES
from hypervisor.memory import Memory
from hypervisor.qmp import CommandRefusedError, Event

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hypervisor.devices import Devices
    from hypervisor.qmp import QmpSession


MIB = 1 << 20
BOOT, MOST = 256 * MIB, 8192 * MIB


class OldQemu:
    """A session whose QEMU has no virtio-mem, and whose guest obeys at once."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refuses: tuple[str, ...] = ()
        self.sizes: dict[str, int] = {}
        self.plugged: dict[str, int] = {}
        self._answers: asyncio.Queue[Event] = asyncio.Queue()

    @contextmanager
    def events(self, *_names: str) -> Iterator[OldQemu]:
        yield self

    async def next(self) -> Event:
        return await self._answers.get()

    async def ask(
        self,
        _kind: type[object],
        command: str,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        **_limits: float,
    ) -> dict[str, int]:
        if command in self.refuses or command == "device-list-properties":
            raise CommandRefusedError(f"qmp: {command}: no", kind="GenericError")
        match command:
            case "query-memory-size-summary":
                return {"base-memory": BOOT, "plugged-memory": sum(self.plugged.values())}
            case "object-add":
                self.sizes[arguments["id"]] = arguments["size"]
            case "device_add":
                self.plugged[arguments["id"]] = self.sizes[arguments["memdev"]]
                self._answer(arguments["id"], source=1)
            case "device_del":
                del self.plugged[arguments["id"]]
                self._answer(arguments["id"], source=3)
        self.asked.append(" ".join((command, arguments["id"])))
        return {}

    def _answer(self, device: str, *, source: int) -> None:
        slot = device.removeprefix("memory-module")
        info = {"source": source, "status": 0, "slot": slot, "slot-type": "DIMM"}
        self._answers.put_nowait(Event("ACPI_DEVICE_OST", {"info": info}))


@pytest.fixture
async def qemu() -> OldQemu:
    return OldQemu()


@pytest.fixture
def memory(qemu: OldQemu) -> Memory:
    return Memory(cast("QmpSession", qemu), cast("Devices", None), boot_bytes=BOOT, most_bytes=MOST)


async def test_a_module_follows_its_backend_and_is_a_multiple_of_128_mib(
    qemu: OldQemu, memory: Memory
) -> None:
    assert await memory.resize(BOOT + 130 * MIB) == BOOT + 256 * MIB
    assert qemu.asked == ["object-add memory-module0-ram", "device_add memory-module0"]


async def test_only_unneeded_modules_are_removed_newest_first(qemu: OldQemu, memory: Memory) -> None:
    for more in (128, 384):
        await memory.resize(BOOT + more * MIB)
    assert await memory.resize(BOOT + 256 * MIB) == BOOT + 384 * MIB
    qemu.asked.clear()
    assert await memory.resize(BOOT) == BOOT
    assert qemu.asked == [
        *("device_del memory-module1", "object-del memory-module1-ram"),
        *("device_del memory-module0", "object-del memory-module0-ram"),
    ]


async def test_a_module_that_qemu_refuses_leaves_nothing_behind(qemu: OldQemu, memory: Memory) -> None:
    qemu.refuses = ("device_add",)
    with pytest.raises(ResizeError, match=r"^resize memory: 384 MiB: qmp: device_add: no$"):
        await memory.resize(BOOT + 128 * MIB)
    assert qemu.asked == ["object-add memory-module0-ram", "object-del memory-module0-ram"]
    qemu.refuses = ()
    assert await memory.resize(BOOT + 128 * MIB) == BOOT + 128 * MIB


async def test_the_number_of_modules_is_limited(memory: Memory) -> None:
    for number in range(1, MEMORY_MODULES + 1):
        await memory.resize(BOOT + number * 128 * MIB)
    with pytest.raises(ResizeError, match=r"all 16 modules are in use; shrink it first"):
        await memory.resize(MOST)

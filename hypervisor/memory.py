"""The memory that a running virtual machine has gained since its boot.

A virtio-mem device provides it, and the guest uses the requested part of it (virtio 1.2, 5.15). QEMU
reports each step that the guest makes. If QEMU or the guest has no virtio-mem, whole memory modules (pc-dimm)
are added and removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from hypervisor import acpi
from hypervisor.argv import MEMORY_MODULES
from hypervisor.devices import Command, Description
from hypervisor.errors import HotplugError, QmpError, ResizeError, ResizeRefusedError
from hypervisor.qmp import CommandRefusedError
from hypervisor.vfio import pinning_timeout_s

if TYPE_CHECKING:
    from hypervisor.devices import Devices
    from hypervisor.qmp import EventStream, QmpSession

log = logging.getLogger(__name__)

MIB = 1 << 20

STEP = 4 * MIB
"""The smallest step in which Linux on x86 adds or removes memory: its page block or the device's block."""

MODULE_STEP = 128 * MIB
"""The smallest memory module that Linux on x86 accepts."""

_DEVICE = "memory-device"
_PATH = f"/machine/peripheral/{_DEVICE}"
_DRIVER = "virtio-mem-pci"
_BACKEND = {"qom-type": "memory-backend-memfd", "share": True}

_SILENCE_S = 15.0
"""How long a guest may take between two steps. Linux retries only after 50 s."""


class Memory:
    """The memory of one virtual machine.

    :param session: the control connection.
    :param devices: where the virtio-mem device is plugged.
    :param boot_bytes: its memory at boot.
    :param most_bytes: the most that it can have.
    :param huge_pages: whether all of it is of huge pages that the host has reserved.
    """

    def __init__(
        self,
        session: QmpSession,
        devices: Devices,
        *,
        boot_bytes: int,
        most_bytes: int,
        huge_pages: bool = False,
    ) -> None:
        self._session = session
        self._devices = devices
        self._boot = boot_bytes
        self._most = most_bytes
        # Unused memory takes no huge page. If the host has none left, the guest gets an error and is not
        # killed.
        self._backend = {**_BACKEND, **({"hugetlb": True, "reserve": False} if huge_pages else {})}
        self._properties = {"prealloc": True} if huge_pages else {}
        self._lock = asyncio.Lock()
        self._plugged = False
        self._by_modules = False
        self._modules: list[tuple[acpi.AcpiSlot, int]] = []

    async def resize(self, size: int) -> int:
        """Add or remove memory; return when the guest has done it.

        :param size: the wanted size, in bytes; rounded up to a size that the guest can have.
        :returns: the new size, in bytes, by QEMU's own count.
        :raises ResizeError: if the machine cannot have this size, or QEMU refuses.
        :raises ResizeRefusedError: if the guest stops before the size is reached.
        """
        if not self._boot <= size <= self._most:
            raise ResizeError(
                f"resize memory: {size // MIB} MiB: the virtual machine can have {self._boot // MIB} to "
                f"{self._most // MIB} MiB; start it with others"
            )
        async with self._lock:
            try:
                if not self._by_modules:
                    await self._resize_device(size)
                if self._by_modules:
                    await self._resize_modules(size)
                return await self.total()
            except (QmpError, HotplugError) as error:
                raise ResizeError(f"resize memory: {size // MIB} MiB: {error}") from error

    async def total(self) -> int:
        """Return the size of the memory, in bytes, by QEMU's own count.

        :raises QmpError: if QEMU does not answer.
        """
        summary = await self._session.ask(dict, "query-memory-size-summary")
        return int(summary["base-memory"]) + int(summary.get("plugged-memory", 0))

    # -- virtio-mem ---------------------------------------------------------------------------------

    async def _resize_device(self, size: int) -> None:
        wanted = _round_up(size - self._boot, STEP)
        if not self._plugged:
            if not wanted:
                return
            await self._plug_device()
        if self._by_modules:
            return
        with self._session.events("MEMORY_DEVICE_SIZE_CHANGE") as events:
            await self._request(wanted)
            reached = await self._follow(wanted, events)
        if reached == wanted:
            return
        # Otherwise the guest would unexpectedly continue some minutes later.
        await self._request(reached)
        if not reached and not await self._session.driver_runs(_DEVICE):
            log.warning("resize memory: the guest has no driver for virtio-mem; using memory modules")
            self._by_modules = True
            return
        raise ResizeRefusedError(
            f"resize memory: {size // MIB} MiB: the guest stopped at {(self._boot + reached) // MIB} MiB and "
            f"made no step for {_SILENCE_S:g} s; free memory there and try again",
            reached=await self.total(),
        )

    async def _plug_device(self) -> None:
        try:
            await self._session.ask(list, "device-list-properties", {"typename": _DRIVER})
        except CommandRefusedError:
            log.warning("resize memory: this QEMU has no virtio-mem; using memory modules")
            self._by_modules = True
            return
        backend = {**self._backend, "id": f"{_DEVICE}-ram"}
        await self._devices.plug(
            Description(
                id=_DEVICE,
                driver=_DRIVER,
                properties={"memdev": backend["id"], **self._properties},
                backend=[
                    Command("object-add", {**backend, "size": _round_up(self._most - self._boot, STEP)})
                ],
                undo=[Command("object-del", {"id": backend["id"]})],
            )
        )
        self._plugged = True

    async def _request(self, size: int) -> None:
        arguments = {"path": _PATH, "property": "requested-size", "value": size}
        await self._session.ask(dict, "qom-set", arguments)

    async def _follow(self, wanted: int, events: EventStream) -> int:
        """Wait until the guest has the requested size, or makes no more progress.

        :returns: its part of the device, in bytes.
        """
        with contextlib.suppress(TimeoutError):
            while await self._device_size() != wanted:
                async with asyncio.timeout(_SILENCE_S):
                    await events.next()
        return await self._device_size()

    async def _device_size(self) -> int:
        return await self._session.ask(int, "qom-get", {"path": _PATH, "property": "size"})

    # -- memory modules -----------------------------------------------------------------------------

    async def _resize_modules(self, size: int) -> None:
        missing = size - self._boot - sum(bytes_ for _, bytes_ in self._modules)
        with self._session.events(*acpi.EVENTS) as events:
            if missing > 0:
                await self._add_module(_round_up(missing, MODULE_STEP), events)
            # Only whole modules can be removed, and only if the guest has enough memory without them.
            while self._modules and self._modules[-1][1] <= -missing:
                missing += self._modules[-1][1]
                await self._remove_module(events)

    async def _add_module(self, size: int, events: EventStream) -> None:
        number = next(iter(set(range(MEMORY_MODULES)) - {slot.number for slot, _ in self._modules}), None)
        if number is None:
            raise ResizeError(f"resize memory: all {MEMORY_MODULES} modules are in use; shrink it first")
        slot = acpi.AcpiSlot("DIMM", number, f"memory-module{number}")
        backend = {**self._backend, "id": f"{slot.device}-ram"}
        await self._session.ask(dict, "object-add", {**backend, "size": size})
        try:
            arguments = {"driver": "pc-dimm", "id": slot.device, "memdev": backend["id"], "slot": number}
            # If the guest has a device of the host, that device will reach the module, too.
            patience_s = pinning_timeout_s(size)
            await self._session.ask(dict, "device_add", arguments, timeout_s=patience_s)
        except CommandRefusedError:
            await self._session.ask(dict, "object-del", {"id": backend["id"]})
            raise
        self._modules.append((slot, size))
        if problem := await acpi.answer(slot, events, leaving=False, timeout_s=_SILENCE_S):
            raise ResizeRefusedError(
                f"resize memory: {slot.device}: the guest did not take {size // MIB} MiB ({problem}); "
                "see its console",
                reached=await self.total(),
            )

    async def _remove_module(self, events: EventStream) -> None:
        slot, size = self._modules[-1]
        await self._session.ask(dict, "device_del", {"id": slot.device})
        if problem := await acpi.answer(slot, events, leaving=True, timeout_s=_SILENCE_S):
            raise ResizeRefusedError(
                f"resize memory: {slot.device}: the guest keeps {size // MIB} MiB ({problem}); "
                "free memory there and try again",
                reached=await self.total(),
            )
        self._modules.pop()
        await self._session.ask(dict, "object-del", {"id": f"{slot.device}-ram"})


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step

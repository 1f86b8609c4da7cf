"""A running QEMU virtual machine: its parts, their abilities, and the reason for their end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from hypervisor import nics, parking, vfio
from hypervisor.disks import Disks
from hypervisor.errors import ParkError, QmpError
from hypervisor.exits import vm_exit_reason
from hypervisor.host_side import A_MOMENT_S, LAST_WORDS_S, cancel
from hypervisor.interface import Accelerator
from hypervisor.memory import Memory
from hypervisor.seclusion import give_devices
from hypervisor.vcpus import Vcpus
from hypervisor.vsock import NotListeningError
from proto.extensions import READY_MARK

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

    from hypervisor.devices import Devices
    from hypervisor.errors import HypervisorError
    from hypervisor.host_side import HostSide
    from hypervisor.interface import HostPciDevice, Nic, VmSpec
    from hypervisor.parking import ParkedMemory

log = logging.getLogger(__name__)

_REDIAL_S = 0.05
_CLONE_REDIAL_S = 0.01
"""A clone writes nothing to its console and soon serves, so it is dialled more often."""
_CONSOLE_LINES = 50


class RunningVm:
    """The parts of a virtual machine that exist only while it runs.

    :param spec: the virtual machine.
    :param host: its side of the host, complete.
    :param devices: the devices plugged into it.
    :param on_end: called with the reason, in one line, once QEMU is gone.
    :param on_devices: called with the numbers of the host's devices that QEMU is about to open.
    """

    def __init__(
        self,
        spec: VmSpec,
        host: HostSide,
        devices: Devices,
        *,
        on_end: Callable[[str], None],
        on_devices: Callable[[Iterable[tuple[int, int]]], None],
    ) -> None:
        parts = host.complete()
        self.qemu = parts.qemu
        self._spec = spec
        self._host = host
        self._qmp = parts.qmp
        self._console = parts.console
        self._channel = parts.channel
        self._redial_s = _REDIAL_S if spec.template is None else _CLONE_REDIAL_S
        self.devices = devices
        self.disks = Disks(parts.qmp, devices, fast_io=spec.jail is None)
        self.vcpus = Vcpus(
            parts.qmp,
            pid=parts.qemu.pid,
            boot=spec.vcpus,
            most=spec.max_vcpus,
            emulated=spec.accelerator is Accelerator.TCG,
        )
        self.memory = Memory(
            parts.qmp,
            devices,
            boot_bytes=spec.memory_bytes,
            most_bytes=spec.max_memory_bytes,
            huge_pages=spec.huge_pages,
        )
        self._has_host_devices = False
        self._parked: ParkedMemory | None = None
        self._on_end = on_end
        self._on_devices = on_devices
        self._watching = asyncio.create_task(devices.watch())
        self._supervisor = asyncio.create_task(self._supervise())

    async def settle(self) -> None:
        """Wait until QEMU's imminent end has been reported and the tasks here have ended."""
        await asyncio.wait([self._supervisor])
        self._release_parked()
        await cancel(self._watching)

    async def plug_nic(self, nic: Nic) -> str:
        """Add a network interface; see ``nics.plug``."""
        return await nics.plug(nic, session=self._qmp, devices=self.devices)

    async def plug_pci(self, device: HostPciDevice) -> str:
        """Add a PCI device of the host; see ``vfio.plug``."""
        self._has_host_devices = True  # an attempt counts, and an unplugged device may come back
        nodes = vfio.nodes(device)
        self._on_devices(vfio.numbers(nodes))
        await give_devices(self.qemu.pid, self._spec, nodes)
        return await vfio.plug(device, devices=self.devices, memory_bytes=await self.memory.total())

    @property
    def is_parked(self) -> bool:
        """Whether its memory is in a file."""
        return self._parked is not None

    async def park(self, file: int) -> int:
        """Stop, and move the memory to a file; see ``Hypervisor.park``."""
        if self._spec.huge_pages:
            raise ParkError("park: its memory consists of huge pages, which the host has reserved for it")
        if self._has_host_devices:
            raise ParkError("park: it has PCI devices of the host, which reach its memory at any time")
        try:
            await self._qmp.ask(dict, "stop")
            self._parked = await parking.write_out(self._host, file, least_bytes=self._spec.memory_bytes)
            await parking.empty(self._host)
        except (ParkError, QmpError) as error:
            await self._go_on_after(error)
            raise ParkError(str(error)) from error
        return self._parked.memory_bytes

    async def unpark(self) -> None:
        """Move the memory back, and go on; see ``Hypervisor.unpark``."""
        if self._parked is None:
            return
        await parking.put_back(self._host, self._parked)
        try:
            await self._qmp.ask(dict, "cont")
        except QmpError as error:
            raise ParkError(f"unpark: {error}") from error
        self._release_parked()

    async def _go_on_after(self, error: HypervisorError) -> None:
        """Let the machine run after it could not be parked, or end it: it never runs without its memory."""
        try:
            if self._parked is None:
                await self._qmp.ask(dict, "cont")
            else:
                await self.unpark()
        except (ParkError, QmpError) as further:
            log.error("park: %s; the machine is ended, because it does not go on: %s", error, further)  # noqa: TRY400 - one line, no traceback
            self.qemu.kill()

    def _release_parked(self) -> None:
        if self._parked is not None:
            os.close(self._parked.file)
            self._parked = None

    async def dial(self, port: int) -> socket.socket:
        """Try once to connect to a port of the guest.

        :param port: the guest's port.
        :raises NotListeningError: if the guest does not listen yet.
        :raises ChannelError: if it never will.
        """
        if self._channel.needs_driver and not await self._is_settled():
            raise NotListeningError("the guest's driver does not run yet")
        return await self._channel.dial(port)

    async def _is_settled(self) -> bool:
        """Tell whether the device's daemon surely has its queues.

        QEMU hands the queues over when the guest writes DRIVER_OK, and does not wait for the daemon to read
        them. The agent's ready mark is proof, too, but a clone's agent wrote it before it was saved.
        """
        if any(READY_MARK in line for line in self._console.tail(_CONSOLE_LINES)):
            return True
        try:
            return await self._qmp.driver_runs(self._channel.needs_driver) and self._channel.is_handed_over()
        except QmpError:  # QEMU is ending; the wait for its end will report why
            return False

    async def hint(self) -> None:
        """Wait until dialling again makes sense: the guest has written something, or a moment has passed."""
        self._console.grew.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._redial_s):
                await self._console.grew.wait()

    async def _supervise(self) -> None:
        """Wait until QEMU or a daemon ends, then end QEMU and report the reason."""
        qemu, daemons = self.qemu, self._host.daemons
        broken = asyncio.create_task(self._qmp.broken())
        flooded = asyncio.create_task(self._qmp.flooded())
        overdue = asyncio.create_task(self._overdue())
        watches = (broken, flooded, overdue)
        ends: list[asyncio.Future[Any]] = [*watches, *(each.exited for each in (qemu, *daemons))]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for watch in watches:
            await cancel(watch)
        failed = next((each for each in daemons if each.exited.done()), None)
        if failed is not None and failed.exited.result().code == 0:
            # A daemon ends normally when QEMU hangs up, and its end may be seen before QEMU's.
            await asyncio.wait([qemu.exited], timeout=LAST_WORDS_S)
        blamed = failed if failed and not qemu.exited.done() else None
        qemu.kill()
        status = await qemu.exited
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._qmp.drained()
        self._console.close()
        if not broken.cancelled():
            reason = f"QEMU stopped the virtual machine ({broken.result()})"
        elif not flooded.cancelled():
            reason = f"killed, because its guest flooded the host with {flooded.result()} events"
        elif blamed is not None:
            reason = blamed.obituary()
        else:
            reason = vm_exit_reason(
                status,
                shutdown=self._qmp.shutdown,
                console=self._console.tail(_CONSOLE_LINES),
                stderr=qemu.last_words(),
            )
        self._on_end(reason)

    async def _overdue(self) -> None:
        """Wait until QEMU should have ended: after a shutdown, 7.2 may forever wait for a daemon."""
        await self._qmp.shut_down()
        await asyncio.wait([self.qemu.exited], timeout=A_MOMENT_S)

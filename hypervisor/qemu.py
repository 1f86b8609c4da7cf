"""The QEMU backend: the order in which things start, end, and are blamed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any, TypeVar

from hypervisor import nics, vfio
from hypervisor.booting import boot
from hypervisor.cloning import clone
from hypervisor.disks import Disks
from hypervisor.errors import (
    ChannelError,
    GuestLateError,
    HotplugError,
    HypervisorError,
    QmpError,
    ResizeError,
    TemplateLateError,
    VmStartError,
)
from hypervisor.exits import vm_exit_reason
from hypervisor.host_side import LAST_WORDS_S, HostSide, cancel
from hypervisor.interface import (
    AGENT_READY_MARK,
    Accelerator,
    Disk,
    DiskLimits,
    HostPciDevice,
    HostProcess,
    Hypervisor,
    Nic,
    VmExit,
    VmSpec,
)
from hypervisor.memory import Memory
from hypervisor.vcpus import Vcpus
from hypervisor.vsock import NotListeningError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

    from hypervisor.devices import Devices
    from hypervisor.host_side import Phase
    from hypervisor.process import Process
    from hypervisor.qmp import QmpSession
    from hypervisor.vsock import GuestChannel

_T = TypeVar("_T")

_REDIAL_S = 0.05
_CLONE_REDIAL_S = 0.01
"""A clone says nothing, and is there in a moment."""
_CONSOLE_LINES = 50


class QemuHypervisor(Hypervisor):
    """One QEMU virtual machine with its daemons. To be made inside a running event loop, on the main thread.

    :param spec: the virtual machine.
    :param on_process: called with the name and the id of each process right after it was started.
    :param phase: called with the name of each phase of the start, and entered for its duration.
    """

    def __init__(
        self, spec: VmSpec, *, on_process: Callable[[str, int], None], phase: Phase = contextlib.nullcontext
    ) -> None:
        self._spec = spec
        self._host = HostSide(on_process, phase)
        self._devices: Devices | None = None
        self._disks: Disks | None = None
        self._vcpus: Vcpus | None = None
        self._memory: Memory | None = None
        self._watching: asyncio.Task[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.was_starved = False
        """Whether QEMU, when it was killed, had waited for a processor for longer than it had had one."""
        self._stop_lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[VmExit] = self._loop.create_future()

    async def start(self, *, timeout_s: float) -> None:
        """Start the daemons and QEMU; return when the virtual machine runs.

        :param timeout_s: the longest this may take, in seconds.
        :raises UnsupportedHostError: if this machine's architecture is not supported.
        :raises TemplateError: if the template to clone cannot be used; a machine without one may start.
        :raises VmStartError: if anything failed or the time ran out. Nothing is left running.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._start()
        except TimeoutError:
            await self.stop()
            kind = VmStartError if self._spec.template is None else TemplateLateError
            raise kind(f"start vm: QEMU: not running within {timeout_s:g} s") from None
        except OSError as error:
            await self.stop()
            raise VmStartError(f"start vm: {error.filename or 'host'}: {error.strerror}") from error
        except BaseException:
            await self.stop()
            raise

    @property
    def is_starved(self) -> bool:
        """Whether QEMU lives, and has waited for a processor for longer than it has had one."""
        qemu = self._host.qemu
        if qemu is None or qemu.exited.done():
            return False
        try:
            return qemu.is_starved
        except OSError:  # it ends
            return False

    async def stop(self) -> None:
        """Kill the virtual machine; return when all its processes are gone.

        May be called at any time, repeatedly and by several at once.
        """
        self._stopping = True
        # Whoever kills and whoever saw the end may come at once; a QMP session is closed by one of them.
        async with self._stop_lock:
            self.was_starved = self.was_starved or self.is_starved
            await self._host.destroy()
            if self._supervisor is not None:
                await asyncio.wait([self._supervisor])
            if self._watching is not None:
                await cancel(self._watching)
            await self._host.close()
            if not self._gone.done():
                self._gone.set_result(VmExit(reason="stopped"))

    async def wait(self) -> VmExit:
        """Block until the virtual machine is gone.

        :returns: why it ended.
        """
        return await asyncio.shield(self._gone)

    async def connect(self, port: int, *, timeout_s: float) -> socket.socket:
        """Connect to a port the guest listens on, waiting for the guest to come up.

        :param port: the guest's port; over virtio-serial only ``AGENT_PORT`` exists, and only once.
        :param timeout_s: the longest this may take, in seconds.
        :returns: a connected, non-blocking stream socket, the caller's to close.
        :raises ChannelError: if the time ran out, the virtual machine died (the text has the reason),
            or the channel has no such port.
        """
        what = f"connect guest: port {port}"
        last = "the guest is silent"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await self._while_alive(self._dial(port), what, ChannelError)
                    except NotListeningError as error:
                        last = str(error)
                    await self._while_alive(self._hint(), what, ChannelError)
        except TimeoutError:
            tail = "".join(f"; the guest's console ends with: {line}" for line in self.console_tail(1))
            states = await self._vcpus.states() if self._vcpus is not None else ""
            doing = f"; {states}" if states else ""
            raise GuestLateError(f"{what}: no answer within {timeout_s:g} s ({last}){tail}{doing}") from None

    async def plug_nic(self, nic: Nic) -> str:
        """Add a network interface to the running virtual machine.

        :param nic: the interface.
        :returns: the PCI path at which the guest sees it, in the form of Kata's agent protocol: ``02/1e``.
        :raises HotplugError: if it cannot be added; nothing of it is left.
        :raises QmpError: if QEMU does not answer.
        """
        return await self._while_alive(self._plug_nic(nic), f"plug: {nic.id}", HotplugError)

    async def plug_disk(self, disk: Disk) -> str:
        """Add a disk to the running virtual machine.

        :param disk: the disk.
        :returns: the PCI path at which the guest sees it, in the form of Kata's agent protocol: ``02/1e``.
        :raises HotplugError: if it cannot be added; nothing of it is left.
        :raises QmpError: if QEMU does not answer.
        """
        return await self._while_alive(self._running_disks().plug(disk), f"plug: {disk.id}", HotplugError)

    async def resize_disk(self, device_id: str) -> int:
        """Tell the guest that what is behind a disk has another size now.

        :param device_id: the id it was plugged with.
        :returns: the size, in bytes.
        :raises HotplugError: if there is no such disk, or QEMU refuses.
        :raises QmpError: if QEMU does not answer.
        """
        work = self._running_disks().resize(device_id)
        return await self._while_alive(work, f"resize: {device_id}", HotplugError)

    async def limit_disk(self, device_id: str, limits: DiskLimits) -> None:
        """Replace a disk's rate limits.

        :param device_id: the id it was plugged with.
        :param limits: the new ones.
        :raises HotplugError: if there is no such disk, or QEMU refuses.
        :raises QmpError: if QEMU does not answer.
        """
        work = self._running_disks().limit(device_id, limits)
        await self._while_alive(work, f"limit: {device_id}", HotplugError)

    async def plug_pci(self, device: HostPciDevice) -> str:
        """Give the running virtual machine a PCI device of the host.

        :param device: the device.
        :returns: the PCI path at which the guest sees it, in the form of Kata's agent protocol: ``06/00``.
        :raises HotplugError: if the host has no IOMMU or the device another driver than ``vfio-pci``, if all
            root ports are taken, or if QEMU refuses; nothing of it is left.
        :raises QmpError: if QEMU does not answer.
        """
        return await self._while_alive(self._plug_pci(device), f"plug: {device.id}", HotplugError)

    async def unplug(self, device_id: str, *, timeout_s: float) -> None:
        """Take a device from the guest and remove it with all that was behind it.

        :param device_id: the id it was plugged with.
        :param timeout_s: how long the guest may take to let go of it, in seconds.
        :raises HotplugError: if there is no such device, or the guest refuses or does not answer in time. The
            device stays then; should the guest let go of it later, it is removed after all.
        :raises QmpError: if QEMU does not answer.
        """
        work = self._running_devices().unplug(device_id, timeout_s=timeout_s)
        await self._while_alive(work, f"unplug: {device_id}", HotplugError)

    async def resize_vcpus(self, count: int) -> int:
        """Change the number of virtual CPUs; the guest takes new ones into use when its agent is told to.

        :param count: how many are wanted; the newest go first.
        :returns: how many there are now, by QEMU's count; more than wanted if it cannot take them away
            (emulation): the guest's agent is to leave the rest out of use.
        :raises ResizeError: if there cannot be so many or so few, or QEMU refuses or is gone.
        :raises ResizeRefusedError: if the guest refuses or does not answer; it has ``reached``.
        """
        what = f"resize vcpus: {self._spec.name}"
        if self._vcpus is None:
            raise ResizeError(f"{what}: the virtual machine was not started")
        return await self._while_alive(self._vcpus.resize(count), what, ResizeError)

    async def pin_vcpus(self, cpus: frozenset[int]) -> None:
        """Let the virtual CPUs run on certain processors of the host: on one each if there are as many.

        :param cpus: the processors' numbers; none for all that QEMU may use.
        :raises ResizeError: if the host has no such processor, or QEMU does not answer or is gone.
        """
        what = f"pin vcpus: {self._spec.name}"
        if self._vcpus is None:
            raise ResizeError(f"{what}: the virtual machine was not started")
        await self._while_alive(self._vcpus.pin(cpus), what, ResizeError)

    async def resize_memory(self, size: int) -> int:
        """Change the memory; return when the guest has taken or given it.

        :param size: how much is wanted, in bytes; rounded up to what the guest can do.
        :returns: how much there is now, in bytes, by QEMU's own count.
        :raises ResizeError: if there cannot be so much or so little, or QEMU refuses or is gone.
        :raises ResizeRefusedError: if the guest stops before it is reached; it has ``reached``, in bytes.
        """
        what = f"resize memory: {self._spec.name}"
        if self._memory is None:
            raise ResizeError(f"{what}: the virtual machine was not started")
        return await self._while_alive(self._memory.resize(size), what, ResizeError)

    @property
    def pid(self) -> int:
        """The process id of QEMU; valid after ``start`` returned."""
        assert self._host.qemu is not None, "start() has returned"  # noqa: S101  (a defect of the caller)
        return self._host.qemu.pid

    def console_tail(self, lines: int = 20) -> list[str]:
        """Return the last lines the guest wrote to its console.

        :param lines: how many at most.
        """
        return self._host.console.tail(lines) if self._host.console else []

    def processes(self) -> list[HostProcess]:
        """Return every live process that serves this virtual machine."""
        everyone = self._host.processes
        return [HostProcess(name=each.name, pid=each.pid) for each in everyone if not each.exited.done()]

    async def _start(self) -> None:
        spec, host = self._spec, self._host
        devices = await (clone(spec, host, spec.template) if spec.template else boot(spec, host))
        qemu, qmp = host.qemu, host.qmp
        assert qemu is not None  # noqa: S101  (it runs)
        assert qmp is not None  # noqa: S101
        self._devices = devices
        self._disks = Disks(qmp, devices)
        self._vcpus = Vcpus(
            qmp,
            pid=qemu.pid,
            boot=spec.vcpus,
            most=spec.max_vcpus,
            emulated=spec.accelerator is Accelerator.TCG,
        )
        self._memory = Memory(
            qmp,
            devices,
            boot_bytes=spec.memory_bytes,
            most_bytes=spec.max_memory_bytes,
            huge_pages=spec.huge_pages,
        )
        self._watching = asyncio.create_task(devices.watch())
        self._supervisor = asyncio.create_task(self._supervise(qemu, qmp))

    async def _supervise(self, qemu: Process, qmp: QmpSession) -> None:
        daemons = self._host.daemons
        broken = asyncio.create_task(qmp.broken())
        overdue = asyncio.create_task(_overdue(qemu, qmp))
        ends: list[asyncio.Future[Any]] = [broken, overdue, *(each.exited for each in (qemu, *daemons))]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await cancel(broken)
        await cancel(overdue)
        failed = next((each for each in daemons if each.exited.done()), None)
        if failed is not None and failed.exited.result().code == 0:
            # A daemon ends in good order when QEMU hangs up, and may be seen to end before QEMU is.
            await asyncio.wait([qemu.exited], timeout=LAST_WORDS_S)
        blamed = failed if failed and not qemu.exited.done() else None
        qemu.kill()
        status = await qemu.exited
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await qmp.drained()
        if self._host.console:
            self._host.console.close()
        if self._stopping and status.signal == signal.SIGKILL:
            reason = "stopped"
        elif not broken.cancelled():
            reason = f"QEMU stopped the virtual machine ({broken.result()})"
        elif blamed is not None:
            reason = blamed.obituary()
        else:
            reason = vm_exit_reason(
                status,
                shutdown=qmp.shutdown,
                console=self.console_tail(_CONSOLE_LINES),
                stderr=qemu.last_words(),
            )
        self._gone.set_result(VmExit(reason=reason))

    async def _dial(self, port: int) -> socket.socket:
        channel, qmp = self._host.channel, self._host.qmp
        if channel is None or qmp is None:
            raise ChannelError(f"connect guest: port {port}: the virtual machine was not started")
        if channel.needs_driver and not await self._is_settled(channel, qmp):
            raise NotListeningError("the guest's driver does not run yet")
        return await channel.dial(port)

    async def _is_settled(self, channel: GuestChannel, qmp: QmpSession) -> bool:
        """Tell whether a device's daemon has surely got its queues.

        QEMU hands them over in the guest's write of DRIVER_OK, and does not wait for the daemon to read. An
        agent that says it listens is proof, too; one in a clone has said so before it was saved.
        """
        if any(AGENT_READY_MARK in line for line in self.console_tail(_CONSOLE_LINES)):
            return True
        try:
            return await qmp.driver_runs(channel.needs_driver) and channel.is_handed_over()
        except QmpError:  # QEMU is going: whoever waits for its end will say why
            return False

    async def _hint(self) -> None:
        """Wait until it makes sense to dial again: the guest said something, or a moment passed."""
        assert self._host.console is not None  # noqa: S101  (dialling succeeded in starting)
        self._host.console.grew.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REDIAL_S if self._spec.template is None else _CLONE_REDIAL_S):
                await self._host.console.grew.wait()

    def _running_devices(self) -> Devices:
        if self._devices is None:
            raise HotplugError(f"plug: {self._spec.name}: the virtual machine was not started")
        return self._devices

    def _running_disks(self) -> Disks:
        if self._disks is None:
            raise HotplugError(f"plug: {self._spec.name}: the virtual machine was not started")
        return self._disks

    async def _plug_nic(self, nic: Nic) -> str:
        devices = self._running_devices()
        assert self._host.qmp is not None  # noqa: S101  (the devices are reached through it)
        return await nics.plug(nic, session=self._host.qmp, devices=devices)

    async def _plug_pci(self, device: HostPciDevice) -> str:
        devices = self._running_devices()
        assert self._memory is not None  # noqa: S101  (it was made with the devices)
        return await vfio.plug(device, devices=devices, memory_bytes=await self._memory.total())

    async def _while_alive(
        self, work: Coroutine[Any, Any, _T], what: str, failure: type[HypervisorError]
    ) -> _T:
        """Await something, but no longer than the virtual machine lives."""
        task = asyncio.ensure_future(work)
        try:
            first: tuple[asyncio.Future[Any], ...] = (task, self._gone)
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise failure(f"{what}: the virtual machine is gone: {self._gone.result().reason}")
            return task.result()
        finally:
            await cancel(task)


async def _overdue(qemu: Process, qmp: QmpSession) -> None:
    """Wait until QEMU should be gone: shut down, it may yet wait for a vhost-user daemon for ever (7.2)."""
    await qmp.shut_down()
    await asyncio.wait([qemu.exited], timeout=LAST_WORDS_S)

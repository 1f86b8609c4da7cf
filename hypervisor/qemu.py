"""The QEMU backend: the order of starting and ending parts, and the search for the cause of a failure."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any, TypeVar

from hypervisor import virtiofsd
from hypervisor.booting import boot
from hypervisor.cloning import clone
from hypervisor.errors import (
    ChannelError,
    GuestLateError,
    HotplugError,
    HypervisorError,
    ParkError,
    ResizeError,
    TemplateLateError,
    VmStartError,
)
from hypervisor.host_side import HostSide, cancel
from hypervisor.interface import Hypervisor, VmExit, VmProcess, VmSpec
from hypervisor.override import override
from hypervisor.running import RunningVm
from hypervisor.vsock import NotListeningError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Iterable

    from hypervisor.host_side import OnCommand, Phase
    from hypervisor.interface import Disk, DiskLimits, HostPciDevice, Nic

_T = TypeVar("_T")


class QemuHypervisor(Hypervisor):
    """One QEMU virtual machine with its daemons. Make it in a running event loop, on the main thread.

    :param spec: the virtual machine.
    :param on_process: called with the name and the id of each process right after it was started.
    :param on_devices: called with the major and minor numbers of the host's character devices that QEMU is
        about to open.
    :param phase: called with the name of each phase of the start, and entered for its duration.
    :param on_command: called with the name of each command to QEMU, and how many seconds it took.
    :param on_console_pause: called each time that the guest writes so much that a part is dropped.
    """

    def __init__(
        self,
        spec: VmSpec,
        *,
        on_process: Callable[[str, int], None],
        on_devices: Callable[[Iterable[tuple[int, int]]], None] = lambda _numbers: None,
        phase: Phase = contextlib.nullcontext,
        on_command: OnCommand | None = None,
        on_console_pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._spec = spec
        self._on_devices = on_devices
        self._host = HostSide(on_process, phase, on_command, on_console_pause)
        self._running: RunningVm | None = None
        self._stopping = False
        self._was_starved = False
        self._stop_lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[VmExit] = self._loop.create_future()

    @override
    async def start(self, *, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._start(timeout_s)
        except TimeoutError:
            await self.stop()
            self._host.check_jail()
            kind = VmStartError if self._spec.template is None else TemplateLateError
            raise kind(f"start vm: QEMU: not running within {timeout_s:g} s") from None
        except OSError as error:
            await self.stop()
            self._host.check_jail()
            raise VmStartError(f"start vm: {error.filename or 'host'}: {error.strerror}") from error
        except HypervisorError:
            await self.stop()
            self._host.check_jail()
            raise
        except BaseException:
            await self.stop()
            raise

    @property
    @override
    def is_starved(self) -> bool:
        qemu = self._host.qemu
        if qemu is None or qemu.exited.done():
            return False
        try:
            return qemu.is_starved
        except OSError:  # it ends
            return False

    @property
    @override
    def was_starved(self) -> bool:
        return self._was_starved

    @override
    async def stop(self) -> None:
        self._stopping = True
        # Several tasks may stop the machine at once, but a QMP session must be closed by one of them only.
        async with self._stop_lock:
            self._was_starved = self._was_starved or self.is_starved
            await self._host.destroy()
            if self._running is not None:
                await self._running.settle()
            await self._host.close()
            if not self._gone.done():
                self._gone.set_result(VmExit(reason="stopped"))

    @override
    async def wait(self) -> VmExit:
        return await asyncio.shield(self._gone)

    @override
    async def connect(self, port: int, *, timeout_s: float) -> socket.socket:
        what = f"connect guest: port {port}"
        last = "the guest is silent"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await self._ask(lambda vm: vm.dial(port), what, ChannelError)
                    except NotListeningError as error:
                        last = str(error)
                    await self._ask(RunningVm.hint, what, ChannelError)
        except TimeoutError:
            tail = "".join(f"; the guest's console ends with: {line}" for line in self.console_tail(1))
            states = await self._started(what, ChannelError).vcpus.states()
            doing = f"; {states}" if states else ""
            raise GuestLateError(f"{what}: no answer within {timeout_s:g} s ({last}){tail}{doing}") from None

    @override
    async def plug_nic(self, nic: Nic) -> str:
        return await self._ask(lambda vm: vm.plug_nic(nic), f"plug: {nic.id}", HotplugError)

    @override
    async def plug_disk(self, disk: Disk) -> str:
        return await self._ask(lambda vm: vm.disks.plug(disk), f"plug: {disk.id}", HotplugError)

    @override
    async def resize_disk(self, device_id: str) -> int:
        return await self._ask(lambda vm: vm.disks.resize(device_id), f"resize: {device_id}", HotplugError)

    @override
    async def limit_disk(self, device_id: str, limits: DiskLimits) -> None:
        await self._ask(lambda vm: vm.disks.limit(device_id, limits), f"limit: {device_id}", HotplugError)

    @override
    async def plug_pci(self, device: HostPciDevice) -> str:
        return await self._ask(lambda vm: vm.plug_pci(device), f"plug: {device.id}", HotplugError)

    @override
    async def unplug(self, device_id: str, *, timeout_s: float) -> None:
        await self._ask(
            lambda vm: vm.devices.unplug(device_id, timeout_s=timeout_s), f"unplug: {device_id}", HotplugError
        )

    @override
    async def resize_vcpus(self, count: int) -> int:
        return await self._ask(
            lambda vm: vm.vcpus.resize(count), f"resize vcpus: {self._spec.name}", ResizeError
        )

    @override
    async def pin_vcpus(self, cpus: frozenset[int]) -> None:
        await self._ask(lambda vm: vm.vcpus.pin(cpus), f"pin vcpus: {self._spec.name}", ResizeError)

    @override
    async def resize_memory(self, size: int) -> int:
        return await self._ask(
            lambda vm: vm.memory.resize(size), f"resize memory: {self._spec.name}", ResizeError
        )

    @override
    async def park(self, file: int) -> int:
        return await self._ask(lambda vm: vm.park(file), f"park: {self._spec.name}", ParkError)

    @override
    async def unpark(self) -> None:
        await self._ask(RunningVm.unpark, f"unpark: {self._spec.name}", ParkError)

    @property
    @override
    def pid(self) -> int:
        return self._started("pid", HypervisorError).qemu.pid

    @property
    @override
    def share_file_limit(self) -> int:
        return virtiofsd.file_limit(each.pid for each in self._host.processes if each.name == virtiofsd.NAME)

    @override
    def console_tail(self, lines: int = 20) -> list[str]:
        return self._host.console.tail(lines) if self._host.console else []

    @override
    def processes(self) -> list[VmProcess]:
        everyone = self._host.processes
        return [VmProcess(name=each.name, pid=each.pid) for each in everyone if not each.exited.done()]

    async def _start(self, timeout_s: float) -> None:
        spec, host = self._spec, self._host
        if spec.template:
            devices = await clone(spec, host, spec.template, timeout_s=timeout_s)
        else:
            devices = await boot(spec, host)
        self._running = RunningVm(spec, host, devices, on_end=self._end, on_devices=self._on_devices)

    def _end(self, reason: str) -> None:
        killed = self._started("end", HypervisorError).qemu.exited.result().signal == signal.SIGKILL
        self._gone.set_result(VmExit(reason="stopped" if self._stopping and killed else reason))

    def _started(self, what: str, failure: type[HypervisorError]) -> RunningVm:
        if self._running is None:
            raise failure(f"{what}: the virtual machine was not started")
        return self._running

    async def _ask(
        self, ask: Callable[[RunningVm], Coroutine[Any, Any, _T]], what: str, failure: type[HypervisorError]
    ) -> _T:
        """Await something from the machine, but no longer than the machine runs.

        :param ask: makes the awaitable.
        :param what: phase and object, for the error.
        :param failure: the error's class, if the machine was not started, is parked or is gone.
        """
        if self._started(what, failure).is_parked and failure is not ParkError:
            raise failure(f"{what}: the virtual machine is parked")
        task = asyncio.ensure_future(ask(self._started(what, failure)))
        try:
            first: tuple[asyncio.Future[Any], ...] = (task, self._gone)
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise failure(f"{what}: the virtual machine is gone: {self._gone.result().reason}")
            return task.result()
        finally:
            await cancel(task)

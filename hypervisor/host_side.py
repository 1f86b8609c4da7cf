"""A virtual machine's processes and connections on the host, from their start to their end."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypervisor import confinement as confinements
from hypervisor.errors import JailError, QmpError
from hypervisor.interface import Accelerator
from hypervisor.launcher import FAILED, MARK
from hypervisor.process import ChildProcess
from hypervisor.seclusion import entering, seclude

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from hypervisor.confinement import Confinement
    from hypervisor.console import Console
    from hypervisor.errors import HypervisorError
    from hypervisor.interface import VmSpec
    from hypervisor.qmp import QmpSession
    from hypervisor.vsock import GuestChannel

    Phase = Callable[[str], AbstractContextManager[object]]
    OnCommand = Callable[[str, float], None]

QEMU = "QEMU"

_ONLY_AS_ROOT = "can only be used by"
"""The message of Rust virtio-fs daemons that cannot run as another user."""

LAST_WORDS_S = 10.0
"""How long a process that has hung up may take to end. A busy host frees its memory only after seconds."""

A_MOMENT_S = 1.0
"""How long to wait for the end of a process that may also go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostParts:
    """The parts on the host that every running virtual machine has.

    :param qemu: QEMU's process.
    :param qmp: the connection that controls it.
    :param console: the guest's output.
    :param channel: the way to the guest's agent.
    """

    qemu: ChildProcess
    qmp: QmpSession
    console: Console
    channel: GuestChannel


class HostSide:
    """The host's side of one virtual machine. Each part is kept from the moment it exists.

    :param on_process: called with the name and the id of each process right after it was started.
    :param phase: called with the name of each phase of a start, and entered for its duration.
    :param on_command: called with the name of each command to QEMU, and how many seconds it took.
    :param on_console_pause: called each time that the guest writes so much that a part is dropped.
    """

    def __init__(
        self,
        on_process: Callable[[str, int], None],
        phase: Phase = contextlib.nullcontext,
        on_command: OnCommand | None = None,
        on_console_pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_process = on_process
        self.phase = phase
        self.on_command = on_command
        self.on_console_pause = on_console_pause
        self._processes: list[ChildProcess] = []
        self.qemu: ChildProcess | None = None
        self._jail_problem = ""
        self.qmp: QmpSession | None = None
        self.console: Console | None = None
        self.channel: GuestChannel | None = None

    @property
    def daemons(self) -> list[ChildProcess]:
        """Every process but QEMU."""
        return [process for process in self._processes if process is not self.qemu]

    @property
    def processes(self) -> list[ChildProcess]:
        """Every process, started or found."""
        return [each for process in self._processes for each in (process, *process.workers)]

    def complete(self) -> HostParts:
        """Return the parts of a machine that has started, which has all of them.

        :raises AssertionError: if one is missing.
        """
        qemu, qmp, console, channel = self.qemu, self.qmp, self.console, self.channel
        if qemu is None or qmp is None or console is None or channel is None:
            raise AssertionError("a virtual machine was started without one of its parts")
        return HostParts(qemu=qemu, qmp=qmp, console=console, channel=channel)

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        inherit: Iterable[int] = (),
        accelerator: Accelerator | None = None,
        keeps_capabilities: bool = False,
        confinement: Confinement | None = None,
    ) -> ChildProcess:
        """Start a process; see ``ChildProcess.spawn``.

        :param name: the role of the process.
        :param argv: the program and its arguments.
        :param inherit: descriptors the program gets under the same numbers.
        :param accelerator: how it will run guest instructions, if it runs any.
        :param keeps_capabilities: as ``ChildProcess.spawn`` takes it.
        :param confinement: as ``ChildProcess.spawn`` takes it.
        :raises OSError: if no process could be made, or it could not be recorded.
        """
        # Emulated guests were measured to gain nothing from them, and half a huge page costs a whole one.
        huge_pages = accelerator is not Accelerator.TCG
        try:
            process = ChildProcess.spawn(
                name,
                argv,
                inherit=inherit,
                huge_pages=huge_pages,
                keeps_capabilities=keeps_capabilities,
                confinement=confinement,
            )
        except OSError as error:
            if confinement is not None:
                self._jail_problem = f"{name}: {error.filename}: {error.strerror}"
            raise
        self._processes.append(process)  # first: destroy() must find it even if a later step fails
        if name == QEMU:
            self.qemu = process
        self._on_process(name, process.pid)
        return process

    def check_jail(self) -> None:
        """After a failure, find out whether a process that could not be confined caused it.

        :raises JailError: if it is.
        """
        for process in self._processes:
            if process.exited.done() and process.exited.result().code == FAILED:
                line = process.output().partition("\n")[0]
                if line.startswith(MARK):
                    self._jail_problem = f"{process.name}: {line.removeprefix(MARK)}"
            elif process.is_confined and _ONLY_AS_ROOT in process.output():
                self._jail_problem = f"{process.name}: it must run as root; install version 1.13 or later"
        if self._jail_problem:
            raise JailError(self._jail_problem)

    def spawn_qemu(
        self, spec: VmSpec, argv: Sequence[str], *, inherit: Iterable[int], boots: bool
    ) -> ChildProcess:
        """Start QEMU.

        :param spec: its machine.
        :param argv: the program and its arguments.
        :param inherit: descriptors it gets under the same numbers.
        :param boots: whether it loads a kernel.
        :returns: its process.
        :raises OSError: if no process could be made, or it could not be recorded.
        """
        confinement = confinements.of_qemu(spec, boots=boots)
        words = argv if confinement is not None else [*entering(spec), *argv]
        return self.spawn(QEMU, words, inherit=inherit, accelerator=spec.accelerator, confinement=confinement)

    async def seclude_qemu(self, qemu: ChildProcess, spec: VmSpec) -> None:
        """Take the host's files away from a started QEMU, unless it will need some later.

        :param qemu: its process.
        :param spec: its machine. If it has root ports, QEMU opens devices when they are plugged.
        """
        if not spec.root_ports:
            with self.phase("take files from QEMU"):
                await seclude(qemu.pid, spec)

    async def run(self, name: str, argv: Sequence[str], *, inherit: Iterable[int] = ()) -> ChildProcess:
        """Run a program to its end.

        :param name: the role of the process.
        :param argv: the program and its arguments.
        :param inherit: descriptors the program gets under the same numbers.
        :returns: the process, which has ended.
        :raises OSError: if no process could be made, or it could not be recorded.
        """
        process = self.spawn(name, argv, inherit=inherit)
        await asyncio.shield(process.exited)
        self._processes.remove(process)
        return process

    def adopt_workers(self) -> None:
        """Find the processes that daemons have forked: a sandboxed daemon serves from a child.

        :raises OSError: if one could not be recorded.
        """
        for daemon in self.daemons:
            daemon.adopt_workers()
            for worker in daemon.workers:
                self._on_process(worker.name, worker.pid)

    async def early_cause(self, error: HypervisorError) -> str:
        """Return why QEMU did not start. A daemon's failure has priority, because it often causes QEMU's.

        :param error: how it was noticed.
        """
        await self.qemu_ends(error)
        for daemon in self.daemons:
            if daemon.exited.done() and daemon.exited.result().code != 0:
                return daemon.obituary()
        if self.qemu is not None and self.qemu.exited.done():
            return self.qemu.obituary()
        return f"QEMU: {error}"

    async def qemu_ends(self, error: BaseException) -> None:
        """Wait for QEMU's end after an error that it may have caused.

        :param error: how it was noticed.
        """
        if self.qemu is not None:
            has_hung_up = isinstance(error, QmpError) and self.qmp is not None and not self.qmp.is_open
            timeout_s = LAST_WORDS_S if has_hung_up else A_MOMENT_S
            await asyncio.wait([self.qemu.exited], timeout=timeout_s)

    async def destroy(self) -> None:
        """Kill all processes; return when they are gone."""
        if self.qemu is not None:
            # QEMU first, so that the end of a daemon is not taken for a failure.
            await self.qemu.destroy()
        await asyncio.gather(*(process.destroy() for process in self.daemons))

    async def close(self) -> None:
        """Close all connections. May be called repeatedly."""
        if self.qmp is not None:
            await self.qmp.close()
        if self.console is not None:
            self.console.close()
        if self.channel is not None:
            self.channel.close()


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task; return when it has ended.

    :param task: any task; one that is done is left alone.
    """
    if not task.done():
        task.cancel()
        await asyncio.wait([task])

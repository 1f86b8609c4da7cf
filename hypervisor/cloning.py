"""A virtual machine's start from a template: it continues where another machine was saved."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import architecture, memory_copy, migration, template, virtiofsd, vsock
from hypervisor.argv import HOTPLUG_BUSES, clone_argv, root_ports
from hypervisor.console import Console
from hypervisor.devices import Devices
from hypervisor.errors import HotplugError, QmpError, TemplateError, TemplateLateError
from hypervisor.interface import Channel
from hypervisor.qmp import QmpSession

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hypervisor.argv import ChannelDevice
    from hypervisor.host_side import HostSide
    from hypervisor.interface import VmSpec
    from hypervisor.process import ChildProcess
    from hypervisor.template import TemplateDescription
    from hypervisor.virtiofsd import Dialect
    from hypervisor.vsock import GuestChannel

_STEP_PART = 0.1
"""The part of a clone's time that QEMU may take to start, and again to load. Usually it is 45 s, a hundred
times what either takes: dozens of machines may start at once, and only one that hangs is given up."""

_STALL_PART = 0.05
"""The part of a clone's time for which the copy of the memory may stand still. A copy that makes progress may
take any time."""

_COPIER = "template copier"
_BLOCK = 512  # stat(2)


async def clone(spec: VmSpec, host: HostSide, directory: Path, *, timeout_s: float) -> Devices:
    """Start a machine from a template; return when it runs.

    :param spec: the virtual machine.
    :param host: keeps each part from its start on; after an error, the caller ends the parts.
    :param directory: the template's.
    :param timeout_s: how long the start may take, in seconds; each step may take a small part of it.
    :returns: the devices plugged into it, the share and the agent's channel among them.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises TemplateError: if the template is missing, broken or another machine's, or QEMU cannot load it.
    :raises TemplateLateError: if it takes too long.
    :raises VmStartError: if something failed that would prevent any machine from starting.
    :raises OSError: if the host lacks something.
    """
    virtiofsd.check_propagation(spec.share_source)
    saved = template.read_description(directory)
    if saved.memory_bytes != spec.memory_bytes:
        raise TemplateError(f"template: {directory}: of a machine with {saved.memory_bytes} bytes of memory")
    try:
        return await _clone(spec, host, directory, saved, timeout_s=timeout_s)
    except (QmpError, HotplugError) as error:
        raise TemplateError(f"template: {directory}: {await host.early_cause(error)}") from error


async def _clone(
    spec: VmSpec, host: HostSide, directory: Path, saved: TemplateDescription, *, timeout_s: float
) -> Devices:
    step_s, stall_s = _STEP_PART * timeout_s, _STALL_PART * timeout_s
    with ExitStack() as stack:
        source = template.open_memory(directory, saved)
        stack.callback(os.close, source)
        memory = os.memfd_create("hako-memory", os.MFD_CLOEXEC)
        stack.callback(os.close, memory)
        os.ftruncate(memory, saved.memory_bytes)
        host.channel = channel = vsock.make_channel(spec, spawn=host.spawn)
        # The template has the agent's virtio-serial port. It has no vsock, because QEMU cannot save one.
        in_template = spec.channel is Channel.VIRTIO_SERIAL
        # Once QEMU has its ends, no other process may keep them open: QEMU's death must close them.
        with ExitStack() as handover:
            port = (await channel.open(handover)).fd if in_template else None
            with host.phase("spawn QEMU"):
                qemu, qmp = _spawn_qemu(spec, host, handover, memory=memory, port=port)
        # QEMU takes longest to start. Everything else happens during that time.
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_connect(qemu, qmp, spec, saved, host, directory=directory, step_s=step_s))
                group.create_task(_copy_memory(host, directory, source, memory, saved, stall_s=stall_s))
                sharing = group.create_task(_serve_share(spec, host, stack, saved))
                opening = None if in_template else group.create_task(_open(channel, host, stack))
                state = template.read_state(directory, saved)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        with host.phase("load template"):
            async with _limited(directory, "its state was not loaded", step_s=step_s):
                await _load(qmp, state)
        # The guest is still stopped, so it will find all new devices at once.
        devices = Devices(qmp, buses=HOTPLUG_BUSES, ports=root_ports(spec))
        if opening is not None:
            with host.phase("plug vsock"):
                await vsock.plug(opening.result(), session=qmp, devices=devices)
        with host.phase("plug virtio-fs"):
            share, daemon, dialect = sharing.result()
            await virtiofsd.plug(share, session=qmp, devices=devices)
        with host.phase("cont"):
            await qmp.ask(dict, "cont")
        # The daemon serves, otherwise the share could not have been plugged.
        await virtiofsd.settle(daemon, dialect, spec, host)
        return devices


def _spawn_qemu(
    spec: VmSpec, host: HostSide, handover: ExitStack, *, memory: int, port: int | None
) -> tuple[ChildProcess, QmpSession]:
    host.qmp = qmp = QmpSession(spec.name, handover=handover, on_command=host.on_command)
    host.console = console = Console(
        spec.directory / "console.log", handover=handover, on_pause=host.on_console_pause
    )
    inherit = [qmp.qemu_fd, console.qemu_fd, memory, *([] if port is None else [port])]
    descriptors = template.bare_descriptors(
        qmp=qmp.qemu_fd, console=console.qemu_fd, memory=memory, agent=port
    )
    argv = clone_argv(spec, descriptors, architecture=architecture.for_host())
    return host.spawn_qemu(spec, argv, inherit=inherit, boots=False), qmp


async def _connect(
    qemu: ChildProcess,
    qmp: QmpSession,
    spec: VmSpec,
    saved: TemplateDescription,
    host: HostSide,
    *,
    directory: Path,
    step_s: float,
) -> None:
    with host.phase("QMP"):
        async with _limited(directory, "QEMU did not answer", step_s=step_s):
            await qmp.connect()
    if qmp.version != saved.qemu_version:
        raise TemplateError(f"template: saved by QEMU {saved.qemu_version}, not by this one, {qmp.version}")
    await qmp.ask(dict, "migrate-set-capabilities", migration.IGNORE_SHARED)
    await host.seclude_qemu(qemu, spec)


async def _copy_memory(
    host: HostSide, directory: Path, source: int, memory: int, saved: TemplateDescription, *, stall_s: float
) -> None:
    program = [sys.executable, "-I", "-S", str(Path(memory_copy.__file__))]
    words = [*program, str(source), str(memory), str(saved.data_bytes)]
    with host.phase("copy memory"):
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(_watch_copy(directory, memory, saved, stall_s=stall_s))
                copier = await host.run(_COPIER, words, inherit=[source, memory])
                watching.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
    if copier.exited.result().code != 0:
        raise TemplateError(f"template: {directory / template.MEMORY}: {copier.obituary()}")


async def _watch_copy(directory: Path, memory: int, saved: TemplateDescription, *, stall_s: float) -> None:
    """Raise an error once nothing has been copied for a while."""
    copied = -1
    while (now_copied := os.fstat(memory).st_blocks * _BLOCK) > copied:
        copied = now_copied
        await asyncio.sleep(stall_s)
    raise TemplateLateError(
        f"template: {directory / template.MEMORY}: its copy stands still at {copied >> 20} of "
        f"{saved.data_bytes >> 20} MiB"
    )


@contextlib.asynccontextmanager
async def _limited(directory: Path, failure: str, *, step_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(step_s):
            yield
    except TimeoutError:
        raise TemplateLateError(f"template: {directory}: {failure} within {step_s:g} s") from None


async def _serve_share(
    spec: VmSpec, host: HostSide, stack: ExitStack, saved: TemplateDescription
) -> tuple[socket.socket, ChildProcess, Dialect]:
    listener, share = virtiofsd.connected_pair(spec.directory)
    stack.enter_context(share)
    with listener, host.phase("spawn virtio-fs daemon"):
        dialect = saved.dialect_of(spec.virtiofsd) or await virtiofsd.detect_dialect(spec.virtiofsd)
        daemon = virtiofsd.start(spec, dialect, listener=listener, host=host)
    return share, daemon, dialect


async def _open(channel: GuestChannel, host: HostSide, stack: ExitStack) -> ChannelDevice:
    with host.phase("open agent's channel"):
        return await channel.open(stack)


async def _load(qmp: QmpSession, state: bytes) -> None:
    ours, qemus = socket.socketpair()
    with ours, qmp.events(migration.EVENT) as events:
        with qemus:
            name = await qmp.send_fd(qemus.fileno())
        await qmp.ask(dict, "migrate-incoming", {"uri": f"fd:{name}"})
        ours.settimeout(0)
        try:
            await asyncio.get_running_loop().sock_sendall(ours, state)
            ours.shutdown(socket.SHUT_WR)  # otherwise QEMU would wait for the rest of a truncated state
        except OSError as error:
            raise QmpError("qmp: migrate-incoming: QEMU did not read all of the state") from error
        await migration.completed(qmp, events)

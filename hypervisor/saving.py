"""Makes a template: boots a machine without anything of a sandbox, and saves it once its agent serves."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import mmap
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypervisor import architecture, migration, template
from hypervisor.argv import boot_argv
from hypervisor.console import Console
from hypervisor.errors import HypervisorError, QmpError, VmStartError
from hypervisor.exits import vm_exit_reason
from hypervisor.host_side import HostSide
from hypervisor.interface import Channel
from hypervisor.memory_copy import data_ranges
from hypervisor.qmp import QmpSession
from hypervisor.template import TemplateDescription
from hypervisor.virtiofsd import detect_dialect
from proto.extensions import READY_MARK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypervisor.interface import VmSpec
    from hypervisor.process import ChildProcess

PAGE = 4096
_ZEROS = bytes(PAGE)

_LEFT_IN_GUEST = 16 << 20
"""How much memory the guest is asked to keep, in bytes: less than it needs, so that it gives all it can."""

_BALLOON_SILENCE_S = 2.5
"""While the guest gives pages or takes them back, QEMU reports it every second."""

_CONSOLE_LINES = 50
_CHUNK = 1 << 20


async def save_template(
    spec: VmSpec,
    directory: Path,
    *,
    timeout_s: float,
    on_process: Callable[[str, int], None] = lambda _name, _pid: None,
) -> None:
    """Boot a machine, and save it as soon as its agent serves.

    :param spec: the virtual machine; its share and its template are ignored.
    :param directory: an existing, empty directory for the template's files. It is complete when this
        returns, and useless if it raises.
    :param timeout_s: the longest this may take, in seconds.
    :param on_process: called with the name and the id of each process right after it was started.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises JailError: if QEMU could not be confined.
    :raises VmStartError: if the machine does not start, or cannot be saved. Nothing is left running.
    """
    host = HostSide(on_process)
    try:
        async with asyncio.timeout(timeout_s):
            try:
                await _save(template.bare_machine(spec), directory, host)
            except (HypervisorError, OSError) as error:
                await host.qemu_ends(error)
                host.check_jail()
                raise
    except TimeoutError:
        serves = any(READY_MARK in line for line in _tail(host, _CONSOLE_LINES))
        why = "" if serves else ": the guest's agent has not said that it serves, as Hako's does"
        tail = "".join(f"; the guest's console ends with: {line}" for line in _tail(host, 1))
        raise VmStartError(f"save template: not done within {timeout_s:g} s{why}{tail}") from None
    except QmpError as error:
        raise VmStartError(f"save template: {await host.early_cause(error)}") from error
    except OSError as error:
        raise VmStartError(f"save template: {error.filename or 'host'}: {error.strerror}") from error
    finally:
        await host.destroy()
        await host.close()


async def _save(spec: VmSpec, directory: Path, host: HostSide) -> None:
    with ExitStack() as stack:
        memory = os.memfd_create("hako-memory", os.MFD_CLOEXEC)
        stack.callback(os.close, memory)
        os.ftruncate(memory, spec.memory_bytes)
        # The agent finds its host connected, as in each clone, but the host is silent.
        silent, agent = socket.socketpair()
        stack.enter_context(silent)
        with agent:
            port = agent.fileno() if spec.channel is Channel.VIRTIO_SERIAL else None
            booted = await _boot(spec, host, memory=memory, port=port)
        await _agent_serves(booted)
        qmp = booted.qmp
        await _give_back(qmp, spec.memory_bytes)
        # From here on the guest is stopped, so that its memory and its devices' states agree.
        await qmp.ask(dict, "stop")
        state = await _device_state(qmp)
        data_bytes, written_ns = await asyncio.to_thread(_copy_data, memory, directory / template.MEMORY)
        (directory / template.STATE).write_bytes(state)
        TemplateDescription(
            qemu_version=qmp.version,
            memory_bytes=spec.memory_bytes,
            data_bytes=data_bytes,
            memory_written_ns=written_ns,
            state_bytes=len(state),
            state_sha256=hashlib.sha256(state).hexdigest(),
            virtiofsd=template.identity(spec.virtiofsd),
            virtiofsd_dialect=(await detect_dialect(spec.virtiofsd)).value,
        ).write(directory)


@dataclass(frozen=True, slots=True)
class _Booted:
    """The parts of a machine that boots."""

    qemu: ChildProcess
    qmp: QmpSession
    console: Console


async def _boot(spec: VmSpec, host: HostSide, *, memory: int, port: int | None) -> _Booted:
    with ExitStack() as handover:
        host.qmp = qmp = QmpSession(spec.name, handover=handover)
        host.console = console = Console(spec.directory / "console.log", handover=handover)
        descriptors = template.bare_descriptors(
            qmp=qmp.qemu_fd, console=console.qemu_fd, agent=port, memory=memory
        )
        qemu = host.spawn_qemu(
            spec,
            boot_argv(spec, descriptors, architecture=architecture.for_host()),
            inherit=[qmp.qemu_fd, console.qemu_fd, memory, *([] if port is None else [port])],
            boots=True,
        )
    await qmp.connect()
    return _Booted(qemu, qmp, console)


def _tail(host: HostSide, lines: int) -> list[str]:
    return host.console.tail(lines) if host.console else []


async def _agent_serves(booted: _Booted) -> None:
    qemu, console = booted.qemu, booted.console
    while not any(READY_MARK in line for line in console.tail(_CONSOLE_LINES)):
        console.grew.clear()
        grew = asyncio.create_task(console.grew.wait())
        try:
            ends: list[asyncio.Future[Any]] = [grew, qemu.exited]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            grew.cancel()
        if qemu.exited.done():
            await booted.qmp.drained()
            reason = vm_exit_reason(
                qemu.exited.result(),
                shutdown=booted.qmp.shutdown,
                console=console.tail(_CONSOLE_LINES),
                stderr=qemu.last_words(),
            )
            raise VmStartError(f"save template: {reason}")


async def _give_back(qmp: QmpSession, memory_bytes: int) -> None:
    """Take the unused pages from the guest, and give them back empty."""
    with qmp.events("BALLOON_CHANGE") as events:
        for size in (_LEFT_IN_GUEST, memory_bytes):
            await qmp.ask(dict, "balloon", {"value": size})
            with contextlib.suppress(TimeoutError):
                while (await qmp.ask(dict, "query-balloon"))["actual"] != size:
                    async with asyncio.timeout(_BALLOON_SILENCE_S):
                        await events.next()


async def _device_state(qmp: QmpSession) -> bytes:
    ours, qemus = socket.socketpair()
    with ours, qmp.events(migration.EVENT) as events:
        with qemus:
            ours.settimeout(0)
            await qmp.ask(dict, "migrate-set-capabilities", migration.IGNORE_SHARED)
            name = await qmp.send_fd(qemus.fileno())
        try:
            async with asyncio.TaskGroup() as group:
                # QEMU may write before it answers. It answers nothing then until all of the state is read,
                # because it writes with its lock held, and a socket holds less.
                group.create_task(qmp.ask(dict, "migrate", {"uri": f"fd:{name}"}))
                state = await _read_all(ours)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors  # the command's, if it failed
        await migration.completed(qmp, events)
    return state


async def _read_all(connection: socket.socket) -> bytes:
    data = bytearray()
    while chunk := await asyncio.get_running_loop().sock_recv(connection, _CHUNK):
        data += chunk
    return bytes(data)


def _copy_data(memory: int, target: Path) -> tuple[int, int]:
    """Write the pages that are not zero to a sparse file; return their size in bytes and the file's time."""
    written = 0
    with target.open("xb", buffering=0) as file, mmap.mmap(memory, 0, prot=mmap.PROT_READ) as pages:
        file.truncate(len(pages))
        for begin, end in data_ranges(memory):
            start = None
            for offset in (*range(begin, end, PAGE), end):
                used = offset < end and pages[offset : offset + PAGE] != _ZEROS
                if used and start is None:
                    start = offset
                elif not used and start is not None:
                    written += os.pwrite(file.fileno(), pages[start:offset], start)
                    start = None
        return written, os.fstat(file.fileno()).st_mtime_ns

"""The end of a virtual machine is noticed at once, and its reason is the right one."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from hypervisor import Channel, ChannelError
from proto.extensions import AGENT_PORT
from tests.patience import patient

from .conftest import BOOT_S, JAIL, START_S

if TYPE_CHECKING:
    from typing import Any

    from tests.integration.hypervisor.conftest import Machines


END_S = patient(20)
"""Far less than any wait for a machine that runs, on a busy host, too."""


async def end_of(vm: Any) -> Any:
    async with asyncio.timeout(END_S):
        return await vm.wait()


@pytest.fixture
async def running(machines: Machines) -> Any:
    vm = machines(channel=Channel.VHOST_USER_VSOCK)
    await vm.start(timeout_s=START_S)
    return vm


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
async def test_qemu_killed(machines: Machines, number: signal.Signals) -> None:
    # Another process's signals, except SIGKILL, do not reach the first process of a pid namespace.
    vm = machines(jail=JAIL if number == signal.SIGKILL else None)
    await vm.start(timeout_s=START_S)
    os.kill(vm.pid, number)
    end = await end_of(vm)
    assert end.reason == f"QEMU killed by signal {number.value}"


async def test_qemu_asked_to_terminate(running: Any) -> None:
    os.kill(running.pid, signal.SIGTERM)
    end = await end_of(running)
    assert end.reason == "QEMU was told to quit (host-signal)"


@pytest.mark.parametrize("victim", ["virtio-fs daemon", "vhost-device-vsock"])
async def test_a_daemon_killed_ends_the_machine_and_is_named(
    running: Any, machines: Machines, victim: str
) -> None:
    # The first of that name is the one the supervisor started; a worker comes after it.
    pid = next(pid for name, pid in machines.started if name == victim)
    os.kill(pid, signal.SIGKILL)
    end = await end_of(running)
    assert end.reason.startswith(f"{victim} killed by signal 9")
    assert running.processes() == [] or [each.name for each in running.processes()] != ["QEMU"]


async def test_the_virtio_fs_worker_killed_ends_the_machine_and_names_the_daemon(
    running: Any, machines: Machines
) -> None:
    pid = [pid for name, pid in machines.started if name == "virtio-fs daemon"][-1]
    os.kill(pid, signal.SIGKILL)
    end = await end_of(running)
    assert end.reason.startswith("virtio-fs daemon ")


async def test_a_guest_without_init_panics_with_its_line(machines: Machines) -> None:
    vm = machines(kernel_parameters=("rdinit=/nonexistent",), channel=Channel.VHOST_USER_VSOCK)
    await vm.start(timeout_s=START_S)
    # Asked about a vhost-user device meanwhile, QEMU 7.2 may announce its shutdown and then never leave.
    with pytest.raises(ChannelError, match=r"guest panicked: .*Kernel panic - not syncing: "):
        await vm.connect(AGENT_PORT, timeout_s=BOOT_S)
    end = await end_of(vm)
    assert "Kernel panic - not syncing: " in end.reason


async def test_connecting_fails_with_the_reason_the_moment_the_machine_dies(running: Any) -> None:
    connecting = asyncio.create_task(running.connect(4, timeout_s=BOOT_S))
    await asyncio.sleep(0.3)
    os.kill(running.pid, signal.SIGKILL)
    async with asyncio.timeout(END_S):
        with pytest.raises(ChannelError, match="the virtual machine is gone: QEMU killed by signal 9"):
            await connecting


async def test_connecting_to_a_machine_that_is_gone_fails_at_once(running: Any) -> None:
    await running.stop()
    with pytest.raises(ChannelError, match="gone: stopped"):
        await running.connect(AGENT_PORT, timeout_s=BOOT_S)


async def test_stop_does_not_cover_up_an_end_that_came_before(running: Any) -> None:
    os.kill(running.pid, signal.SIGKILL)
    await end_of(running)
    await running.stop()
    assert (await running.wait()).reason == "QEMU killed by signal 9"


async def test_a_hanging_machine_can_be_stopped(running: Any) -> None:
    os.kill(running.pid, signal.SIGSTOP)
    async with asyncio.timeout(END_S):
        await running.stop()

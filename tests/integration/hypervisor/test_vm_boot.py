"""A virtual machine starts, is reached on each channel, and leaves no trace after stop()."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Channel, ChannelError, vcpus
from proto.extensions import AGENT_PORT
from tests.waiting import reached

from .conftest import BOOT_S, START_S, VIRTIOFSDS, usable_channels

if TYPE_CHECKING:
    from typing import Any

    from tests.integration.hypervisor.conftest import Machines


# A ttrpc request (stream 1) with an empty body: the agent answers it with an error, on the same stream.
REQUEST = struct.pack(">IIBB", 0, 1, 1, 0)
RESPONSE_TYPE = 2


async def ask_agent(connection: Any) -> Any:
    loop = asyncio.get_running_loop()
    with connection:
        async with asyncio.timeout(BOOT_S):
            await loop.sock_sendall(connection, REQUEST)
            header = b""
            while len(header) < 10:
                chunk = await loop.sock_recv(connection, 10 - len(header))
                assert chunk, "the agent hung up"
                header += chunk
    _, stream, kind, _ = struct.unpack(">IIBB", header)
    return stream, kind


@pytest.mark.parametrize("channel", usable_channels())
async def test_the_agent_answers(machines: Machines, channel: Any) -> None:
    vm = machines(channel=channel)
    await vm.start(timeout_s=START_S)
    connection = await vm.connect(AGENT_PORT, timeout_s=BOOT_S)
    assert connection.getblocking() is False
    assert await ask_agent(connection) == (1, RESPONSE_TYPE)


@pytest.mark.parametrize("virtiofsd", VIRTIOFSDS, ids=str)
async def test_either_virtio_fs_daemon_serves(machines: Machines, virtiofsd: Any) -> None:
    vm = machines(virtiofsd=virtiofsd)
    await vm.start(timeout_s=START_S)
    assert await ask_agent(await vm.connect(AGENT_PORT, timeout_s=BOOT_S)) == (1, RESPONSE_TYPE)


async def test_every_process_is_recorded_and_listed(machines: Machines) -> None:
    vm = machines(channel=Channel.VHOST_USER_VSOCK)
    await vm.start(timeout_s=START_S)
    listed = {(process.name, process.pid) for process in vm.processes()}
    assert listed == set(machines.started)
    assert {name for name, _ in listed} == {"QEMU", "virtio-fs daemon", "vhost-device-vsock"}
    assert ("QEMU", vm.pid) in listed


def below(root: Any) -> Any:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


async def test_the_root_that_qemu_sees_holds_no_files_of_the_host(machines: Machines) -> None:
    vm = machines()
    await vm.start(timeout_s=START_S)
    root = Path(f"/proc/{vm.pid}/root")
    assert below(root) == ["dev", "dev/null"]
    with pytest.raises(OSError, match="Read-only file system"):
        (root / "file").touch()


async def test_stop_may_come_at_any_time_and_again(machines: Machines) -> None:
    vm = machines()
    await vm.stop()
    await vm.stop()
    assert (await vm.wait()).reason == "stopped"


async def test_many_may_stop_it_at_once(machines: Machines) -> None:
    vm = machines()
    await vm.start(timeout_s=START_S)
    await asyncio.gather(*(vm.stop() for _ in range(8)))
    assert (await vm.wait()).reason == "stopped"


async def test_stop_during_start_leaves_nothing(machines: Machines) -> None:
    vm = machines(channel=Channel.VHOST_USER_VSOCK)
    starting = asyncio.create_task(vm.start(timeout_s=START_S))
    while not machines.started:  # noqa: ASYNC110  (any moment in the middle will do)
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert vm.processes() == []


async def test_a_second_sandbox_does_not_disturb_the_first(machines: Machines, tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    vms = []
    for directory in directories:
        directory.mkdir()
        vms.append(machines(directory=directory, channel=Channel.VHOST_USER_VSOCK))
    async with asyncio.TaskGroup() as group:
        for vm in vms:
            group.create_task(vm.start(timeout_s=START_S))
    connections = [await vm.connect(AGENT_PORT, timeout_s=BOOT_S) for vm in vms]
    await vms[0].stop()
    connections[0].close()
    assert await ask_agent(connections[1]) == (1, RESPONSE_TYPE)


async def test_a_port_without_a_listener_times_out_with_the_last_console_line(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vcpus, "_STATE_S", START_S)
    vm = machines(channel=Channel.VHOST_USER_VSOCK)
    await vm.start(timeout_s=START_S)
    (await vm.connect(AGENT_PORT, timeout_s=BOOT_S)).close()
    with pytest.raises(ChannelError, match=r"port 4: no answer within 0.5 s .*console ends with.*; vCPU 0 "):
        await vm.connect(4, timeout_s=0.5)


async def test_the_console_is_kept_in_a_file_too(machines: Machines, tmp_path: Path) -> None:
    vm = machines(channel=Channel.VHOST_USER_VSOCK)
    await vm.start(timeout_s=START_S)
    (await vm.connect(AGENT_PORT, timeout_s=BOOT_S)).close()
    tail = await reached(lambda: vm.console_tail(5))
    await vm.stop()
    with (tmp_path / "console.log").open(errors="replace") as log:
        assert tail[-1].strip() in log.read()

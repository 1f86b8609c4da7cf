"""Devices come to and go from a running machine, and its kernel agrees with what QEMU says of them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Disk, DiskLimits, HostPciDevice, HypervisorError, Nic
from hypervisor.devices import Description
from hypervisor.errors import HotplugError
from proto.extensions import AGENT_PORT
from tests.waiting import reached

from .conftest import BOOT_S, START_S, UNPLUG_S
from .guest_shell import PARAMETERS, GuestShell

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from typing import Any

    from hypervisor import QemuHypervisor
    from tests.integration.hypervisor.conftest import Machines


MIB = 1 << 20
DISK_BYTES = 4 * MIB
SLOTS = 62
DISKS = 30
OBJECTS = {"child<throttle-group>", "child<iothread>"}


def nic(number: int, fds: tuple[int, ...]) -> Nic:
    return Nic(id=f"nic{number}", mac=f"02:00:00:00:00:{number:02x}", tap_fds=fds)


def disk(path: Path, number: int = 0, **changes: Any) -> Disk:
    values = {
        "id": f"disk{number}",
        "path": path,
        "serial": f"serial-{number}",
        "read_only": False,
        "discard": True,
        "limits": DiskLimits(),
    }
    return Disk(**{**values, **changes})


def image(directory: Path, number: int = 0, *, size: int = DISK_BYTES) -> Path:
    path = directory / f"disk{number}.img"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def sysfs(pci_path: str) -> str:
    """Where the guest's kernel shows a device, with wildcards for the numbers that it gives to buses."""
    bridge, slot = pci_path.split("/")
    return f"/sys/devices/pci0000:00/0000:00:{bridge}.0/0000:*:{slot}.0"


async def block_name(shell: GuestShell, pci_path: str) -> str:
    await shell.until(f"ls -d {sysfs(pci_path)}/virtio*/block/* >/dev/null 2>&1")
    return Path(await shell(f"ls -d {sysfs(pci_path)}/virtio*/block/*")).name


def taken(vm: Any) -> set[object]:
    slots: set[object] = vm._running.devices._slots._taken
    return slots


async def leftovers(vm: Any) -> list[str]:
    """The parts of a disk or interface that QEMU still has."""
    nodes = await vm._host.qmp.ask(list, "query-named-block-nodes", {"flat": True})
    objects = await vm._host.qmp.ask(list, "qom-list", {"path": "/objects"})
    return [node["node-name"] for node in nodes] + [
        entry["name"] for entry in objects if entry["type"] in OBJECTS
    ]


async def test_a_disk_has_the_bytes_and_the_mode_it_was_plugged_with(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], tmp_path: Path, qemu: Path
) -> None:
    vm, shell = await start(qemu=qemu)
    path = image(tmp_path)
    content = os.urandom(DISK_BYTES)
    path.write_bytes(content)

    name = await block_name(shell, await vm.plug_disk(disk(path)))
    assert await shell(f"cat /sys/block/{name}/serial") == "serial-0"
    assert await shell(f"sha256sum </dev/{name}") == f"{hashlib.sha256(content).hexdigest()}  -"

    # Written by the guest, read on the host.
    write = f"dd if=/dev/urandom of=/dev/{name} bs=1M count=4 conv=fsync 2>/dev/null"
    await shell(write)
    digest = await shell(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/{name}")
    assert digest == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  -"
    assert path.read_bytes() != content

    # Blocks that the guest discards are given back.
    before = path.stat().st_blocks
    await shell(f"blkdiscard /dev/{name}")
    assert path.stat().st_blocks < before / 2

    # A volume that grew.
    os.truncate(path, 2 * DISK_BYTES)
    assert await vm.resize_disk("disk0") == 2 * DISK_BYTES
    await shell.until(f"[ $(cat /sys/block/{name}/size) = {2 * DISK_BYTES // 512} ]")

    # Limits hold from the moment they are set until they are lifted.
    await vm.limit_disk("disk0", DiskLimits(read_bytes_per_s=MIB))
    began_s = time.monotonic()
    await read_two_mebibytes(shell, name)
    assert time.monotonic() - began_s > 0.7, "2 MiB at 1 MiB/s, the first of it in a burst"
    await vm.limit_disk("disk0", DiskLimits(read_bytes_per_s=512))
    await vm.limit_disk("disk0", DiskLimits())
    await read_two_mebibytes(shell, name)  # with the last limit, this would take more than an hour

    await vm.unplug("disk0", timeout_s=UNPLUG_S)
    assert await shell(f"ls -d /sys/block/{name} 2>/dev/null") == ""
    assert (taken(vm), await leftovers(vm)) == (set(), [])


async def read_two_mebibytes(shell: GuestShell, name: str) -> None:
    await shell(f"dd if=/dev/{name} of=/dev/null bs=64k count=32 iflag=direct 2>/dev/null")


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    backing = image(tmp_path, 99)
    command: list[str | Path] = ["/sbin/losetup", "--find", "--show", backing]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(device)
    subprocess.run(["/sbin/losetup", "--detach", device], check=True)


@pytest.fixture
def one_mebibyte(tmp_path: Path) -> Iterator[Any]:
    """A file system without free space."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["/bin/umount", "--lazy", path], check=True)


async def test_failures_of_a_disk_reach_the_guest_and_the_log(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]],
    loop_device: Path,
    one_mebibyte: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vm, shell = await start()

    pci_path = await vm.plug_disk(disk(loop_device, read_only=True, discard=False))
    name = await block_name(shell, pci_path)
    assert await shell(f"cat /sys/block/{name}/ro") == "1"
    assert "not permitted" in await shell(f"echo x >/dev/{name}")
    with pytest.raises(HotplugError, match=r"resize: disk0: .*read-only"):
        await vm.resize_disk("disk0")
    await vm.unplug("disk0", timeout_s=UNPLUG_S)
    await vm.plug_disk(disk(loop_device))
    assert await vm.resize_disk("disk0") == DISK_BYTES
    await vm.unplug("disk0", timeout_s=UNPLUG_S)

    # The host runs out of space: the guest gets an error, and the log one line.
    name = await block_name(shell, await vm.plug_disk(disk(image(one_mebibyte))))
    write = f"dd if=/dev/zero of=/dev/{name} bs=1M count=3 oflag=direct 2>&1"
    with caplog.at_level(logging.ERROR, logger="hypervisor"):
        for _ in range(2):
            assert re.search("No space left|Input/output error", await shell(write))
        await reached(lambda: caplog.records)
    assert [record.message for record in caplog.records] == [
        "disk disk0: write: No space left on device; the guest was given an I/O error"
    ]

    # Pulled while it is read: the reader gets an error and does not hang.
    endless = f"while dd if=/dev/{name} of=/dev/null bs=4k iflag=direct; do :; done"
    await shell(f"({endless}) >/tmp/dd 2>&1 &")
    await vm.unplug("disk0", timeout_s=UNPLUG_S)
    await shell("wait")
    assert re.search("Input/output error|No such", await shell("tail -n 3 /tmp/dd"))
    assert (taken(vm), await leftovers(vm)) == (set(), [])


@pytest.mark.parametrize(
    "rounds", [pytest.param(20, marks=[pytest.mark.nightly, pytest.mark.timeout(1200)]), 1]
)
async def test_no_slot_is_lost_over_rounds_of_thirty_disks(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], tmp_path: Path, rounds: int
) -> None:
    vm, shell = await start()
    contents = {image(tmp_path, number): os.urandom(64 * 1024) for number in range(DISKS)}
    for path, content in contents.items():
        path.write_bytes(content)

    for turn in range(rounds):
        plugging = (vm.plug_disk(disk(path, number)) for number, path in enumerate(contents))
        pci_paths = await asyncio.gather(*plugging)
        assert len(set(pci_paths)) == DISKS
        for number, (path, pci_path) in enumerate(zip(contents, pci_paths, strict=True)):
            name = await block_name(shell, pci_path)
            assert await shell(f"cat /sys/block/{name}/serial") == f"serial-{number}"
            digest = hashlib.sha256(contents[path]).hexdigest()
            assert await shell(f"sha256sum </dev/{name}") == f"{digest}  -"
            size, letter = len(contents[path]) + 4096, chr(ord("a") + (number + turn) % 26)
            os.truncate(path, size)
            assert await vm.resize_disk(f"disk{number}") == size
            await shell.until(f"[ $(cat /sys/block/{name}/size) = {size // 512} ]")
            contents[path] = letter.encode() * size
            await shell(f"head -c {size} /dev/zero | tr '\\0' {letter} >/dev/{name}")
        await asyncio.gather(*(vm.unplug(f"disk{number}", timeout_s=2 * UNPLUG_S) for number in range(DISKS)))
        assert await shell("ls /sys/block | grep -c vd") == "0"
        assert (taken(vm), await leftovers(vm)) == (set(), [])
        assert all(path.read_bytes() == content for path, content in contents.items())


@pytest.mark.parametrize("times", [pytest.param(50, marks=pytest.mark.nightly), 5])
async def test_an_interface_comes_and_goes(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]],
    tap: Callable[..., tuple[int, ...]],
    times: int,
    own_namespace: Path,
    qemu: Path,
) -> None:
    vm, shell = await start(network_namespace=own_namespace, qemu=qemu)
    assert network_namespace_of(vm.pid) == inode_of(own_namespace)
    for number in range(times):
        queues = 2 if number == 1 else 1
        pci_path = await vm.plug_nic(nic(number, tap(number, queues=queues)))
        await shell.until(f"ls -d {sysfs(pci_path)}/virtio*/net/* >/dev/null 2>&1")
        interface = Path(await shell(f"ls -d {sysfs(pci_path)}/virtio*/net/*")).name
        assert await shell(f"cat /sys/class/net/{interface}/address") == f"02:00:00:00:00:{number:02x}"
        assert await shell(f"ip link set {interface} up 2>&1") == ""
        await vm.unplug(f"nic{number}", timeout_s=UNPLUG_S)
        assert await shell("ls /sys/class/net") == "lo"
        assert taken(vm) == set()


def inode_of(path: Path) -> int:
    return path.stat().st_ino


def network_namespace_of(pid: int) -> int:
    return inode_of(Path(f"/proc/{pid}/ns/net"))


@pytest.fixture
def own_namespace() -> Iterator[Path]:
    name = f"hako-test-{os.getpid()}"
    subprocess.run(["/sbin/ip", "netns", "add", name], check=True)
    yield Path("/run/netns", name)
    subprocess.run(["/sbin/ip", "netns", "delete", name], check=True)


async def test_a_failed_plug_or_unplug_is_reported_and_leaves_nothing(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]],
    tmp_path: Path,
    tap: Callable[..., tuple[int, ...]],
    qemu: Path,
) -> None:
    vm, shell = await start(qemu=qemu)
    path = image(tmp_path)
    qmp = vm._host.qmp
    assert qmp is not None

    for wrong, cause in [
        (disk(tmp_path / "none"), "No such file or directory"),
        (disk(Path("/dev/null")), "neither a file nor a block device"),
        (disk(path, serial="x" * 21), "longer than 20 bytes"),
    ]:
        with pytest.raises(HotplugError, match=cause):
            await vm.plug_disk(wrong)
    with pytest.raises(HotplugError, match="nic1: qmp: netdev_add"):
        await vm.plug_nic(nic(1, (qmp._stream.fileno(),)))
    with pytest.raises(HotplugError, match="unplug: nothing: no such device is plugged"):
        await vm.unplug("nothing", timeout_s=UNPLUG_S)
    with pytest.raises(HotplugError, match="resize: nothing: no such disk is plugged"):
        await vm.resize_disk("nothing")
    assert (taken(vm), await leftovers(vm)) == (set(), [])

    await vm.plug_disk(disk(path))
    with pytest.raises(HotplugError, match="exists already"):
        await vm.plug_disk(disk(path))
    with pytest.raises(HotplugError, match="lock"):
        await vm.plug_disk(disk(path, 1))

    # A guest that does not answer, and then does.
    await qmp.ask(dict, "stop")
    with pytest.raises(HotplugError, match=r"disk0: the guest did not let go of it within 0\.5 s"):
        await vm.unplug("disk0", timeout_s=0.5)
    assert len(taken(vm)) == 1
    await qmp.ask(dict, "cont")
    await shell.until("! ls -d /sys/block/vd* >/dev/null 2>&1")
    async with asyncio.timeout(UNPLUG_S):
        while taken(vm):  # noqa: ASYNC110  (nobody waits for this one, so nothing tells of its end)
            await asyncio.sleep(0.01)
    assert await leftovers(vm) == []

    # The guest need not run to take all slots.
    await qmp.ask(dict, "stop")
    for number in range(SLOTS):
        await vm.plug_nic(nic(number, tap(number)))
    with pytest.raises(HotplugError, match=r"all 62 slots .* are taken"):
        await vm.plug_disk(disk(path))


async def test_a_root_port_takes_a_device_and_then_another(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]], qemu: Path
) -> None:
    vm, shell = await start(root_ports=2, qemu=qemu)
    random = Description(
        id="rng", driver="virtio-rng-pci", properties={}, backend=[], undo=[], needs_port=True
    )
    for _ in range(2):
        assert vm._running is not None
        pci_path = await vm._running.devices.plug(random)
        assert pci_path.endswith("/00")
        await shell.until(f"ls -d {sysfs(pci_path)}/virtio* >/dev/null 2>&1")
        await vm.unplug("rng", timeout_s=UNPLUG_S)
        assert await shell(f"ls -d {sysfs(pci_path)} 2>/dev/null") == ""
    # The host's own part cannot be shown here; that it is missing is said.
    with pytest.raises(HotplugError, match=r"plug: gpu: PCI device ffff:ff:1f\.7: the host has no "):
        await vm.plug_pci(HostPciDevice(id="gpu", address="ffff:ff:1f.7"))


@pytest.mark.parametrize("early_s", [0, 0.5])
async def test_a_device_may_come_and_go_before_the_guest_is_up(
    machines: Machines, shell_initrd: Path, tmp_path: Path, early_s: float
) -> None:
    vm = machines(initrd=shell_initrd, kernel_parameters=PARAMETERS)
    await vm.start(timeout_s=START_S)
    await asyncio.sleep(early_s)
    await vm.plug_disk(disk(image(tmp_path)))
    await vm.plug_disk(disk(image(tmp_path, 1), 1))
    await vm.unplug("disk0", timeout_s=BOOT_S)
    shell = GuestShell(await vm.connect(AGENT_PORT, timeout_s=BOOT_S))
    try:
        await shell.until("ls /sys/block/vd* >/dev/null 2>&1")
        assert await shell("cat /sys/block/vd*/serial") == "serial-1"
    finally:
        shell.close()


@pytest.mark.parametrize("end", ["stop", "kill", "panic"])
@pytest.mark.parametrize(
    "repetition", [*(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 34)), 0]
)
async def test_plugging_may_race_with_the_end(
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]],
    tmp_path: Path,
    tap: Callable[..., tuple[int, ...]],
    end: str,
    repetition: Any,
) -> None:
    vm, shell = await start()
    stopped = asyncio.create_task(asyncio.sleep(0.02 * (repetition % 8)))

    async def churn(number: int) -> None:
        """Plug and unplug until the machine is gone."""
        path, fds = image(tmp_path, number), tap(number)
        while True:
            await vm.plug_disk(disk(path, number))
            await vm.plug_nic(nic(number, fds))
            await vm.unplug(f"disk{number}", timeout_s=UNPLUG_S)
            await vm.unplug(f"nic{number}", timeout_s=UNPLUG_S)

    churning = [asyncio.create_task(churn(number)) for number in range(3)]
    await stopped
    match end:
        case "stop":
            await vm.stop()
        case "kill":
            os.kill(vm.pid, signal.SIGKILL)
        case _:
            await asyncio.get_running_loop().sock_sendall(shell._connection, b"echo c >/proc/sysrq-trigger\n")
    async with asyncio.timeout(UNPLUG_S):
        ends = await asyncio.gather(*churning, return_exceptions=True)
        await vm.wait()
    assert all(isinstance(error, HypervisorError) for error in ends), ends
    assert all("gone" in str(error) or "qmp" in str(error) for error in ends), ends

"""Machines start from a saved one and are then independent; an unusable template is reported."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Channel, TemplateError, VmStartError
from hypervisor.saving import save_template
from proto.extensions import AGENT_PORT
from tests.waiting import reached

from .conftest import BOOT_S, SAVE_S, START_S, UNPLUG_S, VIRTIOFSDS, usable_channels
from .test_hotplug import block_name, disk, image, nic, sysfs, taken
from .test_sizing import ALL_CPUS_ON, BACK_ON_HOST_S, memory, on_host, processors
from .test_vm_boot import RESPONSE_TYPE, ask_agent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from hypervisor import VmSpec
    from tests.integration.hypervisor.conftest import Machines


MIB = 1 << 20
SLACK = 16 * MIB
SERVING = {"QEMU", "virtio-fs daemon"}


@pytest.mark.parametrize("channel", usable_channels())
async def test_the_agent_of_a_clone_answers(
    machines: Machines, template_of: Callable[..., Awaitable[Path]], channel: Any, qemu: Path
) -> None:
    vm = machines(qemu=qemu, channel=channel, template=await template_of(qemu=qemu, channel=channel))
    await vm.start(timeout_s=START_S)
    assert await ask_agent(await vm.connect(AGENT_PORT, timeout_s=BOOT_S)) == (1, RESPONSE_TYPE)
    # A second one, which finds everything of the first one's in place.
    if channel is not Channel.VIRTIO_SERIAL:
        assert await ask_agent(await vm.connect(AGENT_PORT, timeout_s=BOOT_S)) == (1, RESPONSE_TYPE)
    # And nothing that only started it.
    await reached(lambda: {each.name for each in vm.processes()} - {"vhost-device-vsock"} == SERVING)


async def test_clones_at_once_have_nothing_in_common(
    clone: Callable[..., Awaitable[Any]], tmp_path: Path, qemu: Path
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = await asyncio.gather(
        clone_shell(clone, qemu, tmp_path / "a"), clone_shell(clone, qemu, tmp_path / "b")
    )
    write = "for i in $(seq 1000); do echo $i {0}; done >/own; sha256sum </own"
    sums = await asyncio.gather(first(write.format("first")), second(write.format("second")))
    assert sums[0] != sums[1]
    assert [
        await shell("echo 3 >/proc/sys/vm/drop_caches; sha256sum </own") for shell in (first, second)
    ] == list(sums)
    third = await clone_shell(clone, qemu, tmp_path)
    assert await third("ls /own 2>&1 | grep -c 'No such file'") == "1", "the template has not changed"


async def clone_shell(clone: Any, qemu: Any, directory: Path) -> Any:
    _vm, shell = await clone(qemu=qemu, directory=directory)
    return shell


@pytest.mark.parametrize("virtiofsd", VIRTIOFSDS, ids=str)
async def test_a_clone_reads_and_writes_the_share(
    clone: Callable[..., Awaitable[Any]], share: Path, virtiofsd: Any, qemu: Path
) -> None:
    _vm, shell = await clone(qemu=qemu, virtiofsd=virtiofsd)
    await shell("mkdir /share")
    await shell.until("mount -t virtiofs kataShared /share")
    assert await shell("cat /share/from-the-host") == "hello"
    digest = await shell(
        "dd if=/dev/urandom of=/share/back bs=1M count=4 2>/dev/null; sha256sum </share/back"
    )
    assert digest == f"{hashlib.sha256((share / 'back').read_bytes()).hexdigest()}  -"


async def test_a_clone_takes_and_gives_devices_processors_and_memory(
    clone: Callable[..., Awaitable[Any]], tap: Callable[..., tuple[int, ...]], tmp_path: Path, qemu: Path
) -> None:
    vm, shell = await clone(qemu=qemu)
    places = set(taken(vm))
    assert len(places) == 1, "the share's"

    path = image(tmp_path)
    content = os.urandom(path.stat().st_size)
    path.write_bytes(content)
    at = await vm.plug_disk(disk(path))
    name = await block_name(shell, at)
    assert await shell(f"sha256sum </dev/{name}") == f"{hashlib.sha256(content).hexdigest()}  -"
    card = await vm.plug_nic(nic(1, tap(1)))
    await shell.until(f"ls -d {sysfs(card)}/virtio*/net/* >/dev/null 2>&1")
    assert len({*taken(vm)}) == 3
    await vm.unplug("disk0", timeout_s=UNPLUG_S)
    await vm.unplug("nic1", timeout_s=UNPLUG_S)
    assert set(taken(vm)) == places
    assert await vm.plug_disk(disk(path)) == at, "its slot is free again"

    before = await memory(shell)
    assert await vm.resize_memory(1024 * MIB) == 1024 * MIB
    assert await memory(shell) - before == 512 * MIB
    assert await vm.resize_memory(512 * MIB) == 512 * MIB
    assert await vm.resize_vcpus(2) == 2
    await shell(ALL_CPUS_ON)
    assert await processors(shell) == 2


async def test_memory_that_the_guest_does_not_use_is_not_in_the_template(
    clone: Callable[..., Awaitable[Any]],
) -> None:
    vm, shell = await clone()
    free = int(await shell("grep MemFree /proc/meminfo | tr -dc 0-9")) * 1024
    directory = vm._spec.template
    described = json.loads((directory / "template.json").read_text())
    # 64 MiB of random bytes were written and freed before the save.
    assert described["data_bytes"] <= described["memory_bytes"] - free + SLACK
    file = (directory / "memory").stat()
    assert file.st_size == described["memory_bytes"]
    assert file.st_blocks * 512 <= described["data_bytes"] + MIB


async def test_a_small_machine_with_an_agent_that_serves_fits_into_60_mib(
    template_of: Callable[..., Awaitable[Path]], qemu: Path
) -> None:
    described = json.loads(
        (await template_of(qemu=qemu, memory_bytes=256 * MIB) / "template.json").read_text()
    )
    # Each clone has all of it to itself. 50 were measured, a third of them the kernel's code.
    assert described["data_bytes"] <= 60 * MIB


async def test_memory_freed_by_the_guest_of_a_clone_goes_back_to_the_host(
    clone: Callable[..., Awaitable[Any]],
) -> None:
    vm, shell = await clone()
    before = on_host(vm)
    await shell("mount -t tmpfs -o size=90% none /mnt; dd if=/dev/zero of=/mnt/full bs=1M count=256")
    assert on_host(vm) - before > 250 * MIB
    await shell("rm /mnt/full")
    deadline = time.monotonic() + BACK_ON_HOST_S
    while on_host(vm) - before > 50 * MIB:
        assert time.monotonic() < deadline, f"{(on_host(vm) - before) // MIB} MiB are still there"
        await asyncio.sleep(0.1)


def without(name: Any) -> Callable[[Any], None]:
    def spoil(directory: Path) -> None:
        (directory / name).unlink()

    return spoil


def cut(name: Any, size: Any) -> Callable[[Any], None]:
    def spoil(directory: Path) -> None:
        os.truncate(directory / name, size)

    return spoil


def emptied(directory: Path) -> None:
    path = directory / "memory"
    before = path.stat()
    os.truncate(path, 16 * MIB)
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def one_byte_of_memory_off(directory: Path) -> None:
    path = directory / "memory"
    with path.open("r+b") as memory:
        memory.seek(20 * MIB)
        byte = memory.read(1)[0]
        memory.seek(20 * MIB)
        memory.write(bytes([byte ^ 1]))


def described_as(**changes: Any) -> Callable[[Any], None]:
    def spoil(directory: Path) -> None:
        path = directory / "template.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def one_byte_of_state_off(directory: Path) -> None:
    path = directory / "state"
    state = bytearray(path.read_bytes())
    state[len(state) // 2] ^= 1
    path.write_bytes(state)


def gibberish(directory: Path) -> None:
    """A state with a valid checksum that QEMU cannot load."""
    state = (directory / "state").read_bytes()
    broken = bytes(len(state) // 2) + state[len(state) // 2 :]
    (directory / "state").write_bytes(broken)
    described_as(state_sha256=hashlib.sha256(broken).hexdigest())(directory)


def half_a_state(directory: Path) -> None:
    """One that ends too early for QEMU."""
    broken = (directory / "state").read_bytes()[:100_000]
    (directory / "state").write_bytes(broken)
    described_as(state_sha256=hashlib.sha256(broken).hexdigest(), state_bytes=len(broken))(directory)


def no_description(directory: Path) -> None:
    (directory / "template.json").write_bytes(b"\xff[")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        pytest.param(shutil.rmtree, "template.json: No such file or directory", id="gone"),
        pytest.param(without("memory"), "memory: No such file or directory", id="no memory"),
        pytest.param(without("state"), "state: No such file or directory", id="no state"),
        pytest.param(cut("memory", 1000), "memory: 1000 bytes instead of 536870912", id="memory cut"),
        pytest.param(emptied, "bytes of data instead of", id="memory has holes"),
        pytest.param(cut("state", 1000), "state: 1000 bytes instead of", id="state cut"),
        pytest.param(one_byte_of_memory_off, "memory: changed since", id="memory changed"),
        pytest.param(one_byte_of_state_off, "state: its checksum is wrong", id="state changed"),
        pytest.param(gibberish, "QEMU exited with status 1", id="state that means nothing"),
        pytest.param(half_a_state, "QEMU exited with status 1", id="state that ends"),
        pytest.param(no_description, "not a template's description", id="no description"),
        pytest.param(described_as(format=0), "written by another version", id="another format"),
        pytest.param(described_as(state_bytes="1"), "a value of the wrong type", id="wrong type"),
        pytest.param(described_as(memory_bytes=MIB), "of a machine with 1048576 bytes", id="other memory"),
        pytest.param(described_as(qemu_version="6.0.0"), "saved by QEMU 6.0.0, not by this", id="other QEMU"),
    ],
)
async def test_a_broken_template_is_reported_with_its_defect(
    machines: Machines, template_of: Callable[..., Awaitable[Path]], tmp_path: Path, spoil: Any, cause: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(await template_of(channel=Channel.VHOST_USER_VSOCK), broken)
    spoil(broken)
    vm = machines(channel=Channel.VHOST_USER_VSOCK, template=broken)
    with pytest.raises(TemplateError, match=r"^template: ") as caught:
        await vm.start(timeout_s=START_S)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)
    assert vm.processes() == []


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        pytest.param({"share_source": Path("/nonexistent/share")}, "/nonexistent/share", id="no directory"),
        pytest.param({"virtiofsd": Path("/bin/true")}, "not a virtio-fs daemon", id="not virtiofsd"),
        pytest.param(
            {"vsock_daemon": Path("/bin/false")}, "vhost-device-vsock exited", id="vsock daemon fails"
        ),
    ],
)
async def test_a_failure_of_any_machine_is_not_blamed_on_the_template(
    machines: Machines, template_of: Callable[..., Awaitable[Path]], changes: dict[str, Any], cause: str
) -> None:
    channel = Channel.VHOST_USER_VSOCK
    vm = machines(channel=channel, template=await template_of(channel=channel), **changes)
    with pytest.raises(VmStartError, match=cause) as caught:
        await vm.start(timeout_s=START_S)
    assert not isinstance(caught.value, TemplateError)
    assert vm.processes() == []


def qemus_of(pid: int) -> list[str]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = [Path(f"/proc/{child}/comm").read_text() for child in children]
    return [name for name in names if "qemu" in name]


@pytest.mark.parametrize(
    ("changes", "timeout_s", "cause"),
    [
        pytest.param({"initrd": Path("/etc/passwd")}, SAVE_S, "Kernel panic", id="no guest"),
        pytest.param({"qemu": Path("/bin/false")}, SAVE_S, "QEMU exited with status 1", id="no QEMU"),
        pytest.param({}, 1, "not done within 1 s: the guest's agent has not said", id="no time"),
    ],
)
async def test_a_machine_that_cannot_be_saved_leaves_no_template(
    make_spec: Callable[..., VmSpec], tmp_path: Path, changes: dict[str, Any], timeout_s: Any, cause: str
) -> None:
    others = qemus_of(os.getpid())
    with pytest.raises(VmStartError, match=f"^save template: .*{cause}"):
        await save_template(make_spec(**changes), tmp_path, timeout_s=timeout_s)
    assert not (tmp_path / "template.json").exists()
    assert qemus_of(os.getpid()) == others

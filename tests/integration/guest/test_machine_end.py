"""How the machine ends: on request, and on a defect."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

import pytest

from guest.image import cpio
from proto.kata import agent_pb2
from tests.integration.guest.agent_client import StatusError
from tests.integration.guest.conftest import IMAGE, Life
from tests.integration.guest.disks import bound, content_of, make_disk
from tests.integration.guest.guest_machine import (
    BOOT_TIMEOUT_S,
    KERNEL_LINE,
    GuestMachine,
    process,
    spec,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_console", "no-such-module"),
)


@pytest.fixture
def own_machine(tmp_path: Path) -> Iterator[GuestMachine]:
    machine = GuestMachine(tmp_path, IMAGE, channel="serial")
    try:
        yield machine
    finally:
        machine.close()


def test_destroying_the_sandbox_writes_back_and_powers_off(own_machine: GuestMachine, tmp_path: Path) -> None:
    own_machine.create_sandbox()
    with pytest.raises(StatusError, match="exists already"):
        own_machine.create_sandbox()
    own_machine.make_rootfs("last")
    container = Life(own_machine, "last")
    disk, volume = make_disk(tmp_path / "disk", "ext4", size_mib=16), "/run/volume"
    whole = spec("last", process("sh", "-c", "echo kept | tee /kept > /volume/kept; echo ready; sleep 100"))
    whole.Mounts.append(bound("/volume", volume))
    place = own_machine.plug_disk(disk, port=0x10)
    storage = agent_pb2.Storage(driver="blk", source=place, fstype="ext4", mount_point=volume)
    container.create_from(whole, storages=[storage])
    container.start()
    assert container.read() == b"ready\n"
    # The machine may be gone before its answer is.
    with contextlib.suppress(ConnectionError):
        own_machine.client.call("DestroySandbox", agent_pb2.DestroySandboxRequest())
    assert own_machine.qemu.wait(timeout=BOOT_TIMEOUT_S) == 0
    assert (own_machine.share / "last/rootfs/kept").read_text() == "kept\n"
    assert content_of(disk, "/kept") == b"kept\n"


def test_crash_of_the_agent_ends_the_machine_and_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "image"
    broken.mkdir()
    (broken / "vmlinux").symlink_to(IMAGE / "vmlinux")
    # The kernel unpacks archives one over the other.
    order = cpio.regular("/usr/lib/modules/boot", "\n".join(MODULES).encode())
    (broken / "initrd").write_bytes((IMAGE / "initrd").read_bytes() + cpio.archive([order]))
    console = tmp_path / "console"
    ended = subprocess.run(
        [
            *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "512"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-append", KERNEL_LINE),
            *("-kernel", str(broken / "vmlinux"), "-initrd", str(broken / "initrd")),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=console,path={console}"),
            *("-device", "virtconsole,chardev=console"),
        ],
        timeout=BOOT_TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0
    lines = console.read_text().splitlines()
    assert "no-such-module.ko" in next(line for line in lines if "hako-agent: crash at" in line)
    assert any("Kernel panic" in line for line in lines)

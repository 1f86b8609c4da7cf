"""Devices of the host in a container's machine: one alone in its group, and a group of two.

They are those of the outer machine of ``scripts/test --kvm``, so no real host loses a device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.life import until
from tests.e2e.tasks import Tasks
from tests.e2e.test_refusals import configured
from tests.e2e.test_sizing import MIB, RESOURCES, UPDATE_TIMEOUT_S
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

DISK = os.environ.get("HAKO_TEST_VFIO_DISK", "")
CARDS = os.environ.get("HAKO_TEST_VFIO_CARDS", "").split()
"""The PCI addresses of an NVMe disk, and of network cards that share a group."""

pytestmark = [
    pytest.mark.hako,
    pytest.mark.skipif(not DISK, reason="no device to give away here; scripts/test --kvm has some"),
]

_PCI = Path("/sys/bus/pci")
FILL = "seq 1 200000 | head -c 1048576 >/tmp/b; dd if=/tmp/b of=/dev/nvme0n1 bs=1M oflag=direct 2>/dev/null; "
DIGEST = "sha256sum </tmp/b"
DRIVERS_OF_CARDS = (
    "cd /sys/bus/pci/devices; for card in $(grep -l 0x1041 */device); do "
    "basename $(readlink ${card%device}driver); done"
)
"""Which drivers the guest has for its network cards (virtio 1.2, 4.1.2). No container sees more of them."""


def give_away(address: str) -> str:
    """Bind a device to VFIO.

    :returns: the path of its group's node.
    """
    bind(address, "vfio-pci")
    return f"/dev/vfio/{(_PCI / 'devices' / address / 'iommu_group').resolve().name}"


def bind(address: str, driver: str) -> None:
    place = _PCI / "devices" / address
    (place / "driver_override").write_text(f"{driver}\n")
    with contextlib.suppress(FileNotFoundError):
        (place / "driver/unbind").write_text(address)
    (_PCI / "drivers_probe").write_text(address)
    assert (place / "driver").resolve().name == driver


@pytest.fixture
def disk() -> Iterator[str]:
    """The disk, as a group that can be given away."""
    yield give_away(DISK)
    bind(DISK, "nvme")


@pytest.fixture
def stack(one_stack: Stack) -> Iterator[Stack]:
    """Machines that have ports for devices of the host, and little memory: a device pins all of it."""
    with configured(one_stack, hypervisor="root_ports = 3\nmemory_mib = 192"):
        yield one_stack


@contextlib.contextmanager
def box(stack: Stack, *devices: str) -> Iterator[str]:
    """A container that is given devices."""
    name = new_id()
    options = ["--detach", *(word for device in devices for word in ("--device", device))]
    try:
        started = stack.containerd.run(IMAGE, name, "sleep", "100000", options=options)
        assert started.code == 0, started.stderr
        yield name
    finally:
        stack.containerd.remove(name)


def refusal(stack: Stack, *devices: str) -> str:
    """Run a container that cannot have its devices, and return the one line that says why."""
    options = [word for device in devices for word in ("--device", device)]
    result = stack.containerd.run(IMAGE, new_id(), "true", options=["--rm", *options])
    assert result.code == 1
    [line] = result.stderr.strip().splitlines()
    return line


def shell(stack: Stack, name: str, script: str) -> str:
    result = stack.containerd.exec(name, new_id(), "sh", "-c", script)
    assert result.code == 0, (script, result.stdout, result.stderr)
    return result.stdout


def on_host() -> str:
    """Digest the beginning of the disk on the host, which drives it again."""
    node = Path("/dev/nvme0n1")
    until(node.exists, what="the host's own driver has the disk", timeout_s=patient(10))
    with node.open("rb") as opened:
        return hashlib.sha256(opened.read(MIB)).hexdigest()


def test_a_container_drives_a_disk_of_the_host(stack: Stack) -> None:
    group = give_away(DISK)
    try:
        with box(stack, group) as name:
            written = shell(stack, name, FILL + DIGEST).split()[0]
            read = shell(stack, name, "dd if=/dev/nvme0n1 bs=1M count=1 iflag=direct 2>/dev/null | sha256sum")
            assert read.split()[0] == written
    finally:
        bind(DISK, "nvme")
    assert on_host() == written


def test_a_machine_with_a_device_grows(stack: Stack, disk: str) -> None:
    with box(stack, disk) as name:
        before = int(shell(stack, name, "grep MemTotal /proc/meminfo").split()[1])
        value = {"type_url": RESOURCES, "value": json.dumps({"memory": {"limit": 64 * MIB}}).encode()}
        with Tasks(stack.containerd.address) as tasks:
            tasks.call("Update", name, resources=value, timeout_s=UPDATE_TIMEOUT_S)
        assert int(shell(stack, name, "grep MemTotal /proc/meminfo").split()[1]) > before
        assert shell(stack, name, FILL + DIGEST)


def test_a_device_in_use_is_refused_and_stays_with_its_user(stack: Stack, disk: str) -> None:
    with box(stack, disk) as name:
        assert "busy" in refusal(stack, disk)
        assert shell(stack, name, FILL + DIGEST)


def test_a_device_survives_the_death_of_its_machine(stack: Stack, disk: str) -> None:
    with box(stack, disk) as name:
        os.kill(stack.containerd.tasks()[name][0], signal.SIGKILL)
        stack.containerd.wait_for_state(name, "STOPPED")
    with box(stack, disk) as name:
        assert shell(stack, name, FILL + DIGEST)


def test_a_group_is_given_away_as_a_whole_or_not_at_all(stack: Stack) -> None:
    groups = {give_away(card) for card in CARDS}
    assert len(groups) == 1
    try:
        with box(stack, *groups) as name:
            assert shell(stack, name, DRIVERS_OF_CARDS).split() == ["virtio-pci"] * len(CARDS)
        bind(CARDS[0], "virtio-pci")
        assert "its driver is virtio-pci" in refusal(stack, *groups)
    finally:
        for card in CARDS:
            bind(card, "virtio-pci")

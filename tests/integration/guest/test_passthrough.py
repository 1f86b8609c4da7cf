"""PCI devices that the guest drives: a container is given the nodes that their drivers make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.kata import agent_pb2, oci_pb2
from tests.integration.guest.disks import MIB
from tests.integration.guest.guest_machine import GuestMachine, process, spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.guest.conftest import Life

PORT = 0x15
HOST_ADDRESS = "0000:3b:00.0"
WRITE = "printf 'from the guest' | dd of=/dev/nvme0n1 conv=notrunc 2>/dev/null; "
READ = "dd if=/dev/nvme0n1 bs=13 count=1 skip=1 2>/dev/null; "
SHOW = "test -c /dev/nvme0 && stat -c '%a %u' /dev/nvme0n1"


def closed(whole: oci_pb2.Spec) -> None:
    """Deny all devices, as containerd does before it allows some."""
    whole.Linux.Resources.Devices.append(oci_pb2.LinuxDeviceCgroup(Allow=False, Access="rwm"))


def test_a_container_has_the_nodes_of_its_device_and_no_other_has_them(
    machine: GuestMachine, new_container: Callable[[], Life], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"." * 13 + b"from the host".ljust(MIB, b"."))
    container, other = new_container(), new_container()
    path = machine.plug_nvme(disk, port=PORT)
    whole = spec(container.id, process("sh", "-c", READ + WRITE + SHOW))
    closed(whole)
    device = agent_pb2.Device(
        id="vfio12",
        type="vfio-pci-gk",
        container_path="/dev/vfio/12",
        options=[f"{HOST_ADDRESS}={path}"],
    )
    container.create_from(whole, devices=[device])
    container.start()
    assert container.read_all() == b"from the host660 0\n"
    assert container.wait() == 0

    whole = spec(other.id, process("sh", "-c", "ls /dev | grep -c nvme; mknod /tmp/x b 259 0; cat /tmp/x"))
    for capabilities in (whole.Process.Capabilities.Effective, whole.Process.Capabilities.Permitted):
        capabilities.append("CAP_MKNOD")
    whole.Process.Capabilities.Bounding.append("CAP_MKNOD")
    closed(whole)
    other.create_from(whole)
    other.start()
    assert other.read_all() == b"0\n"
    assert b"not permitted" in other.read_all("ReadStderr")
    for each in (container, other):
        each.remove()
    machine.unplug_disk(port=PORT)
    assert disk.read_bytes()[:14] == b"from the guest"

"""Volumes, disks and updates of mounted configuration in the real guest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from proto.kata import agent_pb2, oci_pb2
from tests.integration.guest.agent_client import StatusError
from tests.integration.guest.disks import MIB, bound, check, content_of, make_disk
from tests.integration.guest.guest_machine import SHARE, GuestMachine, process, spec
from tests.kubelet_volume import publish
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.guest.conftest import Life

VOLUMES = "/run/kata-containers/sandbox/storage"
UPDATE_TIMEOUT_S = patient(60)
Storage = agent_pb2.Storage


@dataclass(frozen=True)
class Growing:
    fstype: str
    size_mib: int
    port: int


@pytest.mark.parametrize(
    "case",
    [
        Growing("ext4", 32, 0x10),
        Growing("xfs", 320, 0x11),
    ],
    ids=lambda case: case.fstype,
)
def test_a_disk_plugged_later_is_a_volume_that_grows(
    machine: GuestMachine,
    new_container: Callable[[], Life],
    tmp_path: Path,
    case: Growing,
) -> None:
    fstype, size_mib, port = case.fstype, case.size_mib, case.port
    disk = make_disk(tmp_path / "disk", fstype, size_mib=size_mib)
    first, second = new_container(), new_container()
    volume = f"{VOLUMES}/{fstype}"
    place = machine.plug_disk(disk, port=port)
    storage = Storage(
        driver="blk", source=place, fstype=fstype, mount_point=volume, options=["noatime", "_netdev"]
    )
    for container in (first, second):
        whole = spec(container.id, process("cat"))
        whole.Mounts.append(bound("/data", volume))
        container.create_from(whole, storages=[storage])
        container.start()
    first.execute("writer", "sh", "-c", "grep ' /data ' /proc/mounts; echo hello > /data/greeting")
    assert f" /data {fstype} rw,noatime" in first.read_all(exec_id="writer").decode()
    assert first.wait("writer") == 0
    before = volume_bytes(machine, volume)
    machine.resize_disk(port=port, size_bytes=2 * size_mib * MIB)
    machine.client.call(
        "ResizeVolume", agent_pb2.ResizeVolumeRequest(volume_guest_path=volume, size=2 * size_mib * MIB)
    )
    assert volume_bytes(machine, volume) > 1.8 * before
    first.remove()
    second.execute("reader", "cat", "/data/greeting")
    assert second.read_all(exec_id="reader") == b"hello\n"
    second.remove()
    with pytest.raises(StatusError, match="No such file"):
        volume_bytes(machine, f"{volume}/greeting")
    machine.unplug_disk(port=port)
    check(disk, fstype)
    # The slot and the mount point serve again.
    third = new_container()
    whole = spec(third.id, process("cat", "/data/greeting"))
    whole.Mounts.append(bound("/data", volume))
    storage.source = machine.plug_disk(disk, port=port)
    third.create_from(whole, storages=[storage])
    third.start()
    assert third.read_all() == b"hello\n"
    third.remove()
    machine.unplug_disk(port=port)


def volume_bytes(machine: GuestMachine, volume: str) -> int:
    request = agent_pb2.VolumeStatsRequest(volume_guest_path=volume)
    reply = machine.client.call("GetVolumeStats", request)
    assert not reply.volume_condition.abnormal
    total: int = reply.usage[0].total
    return total


def test_a_disk_that_comes_late_is_the_root(
    machine: GuestMachine, new_container: Callable[[], Life], tmp_path: Path
) -> None:
    container, port = new_container(), 0x12
    disk = make_disk(tmp_path / "root", "ext4", size_mib=32, content=machine.share / container.id / "rootfs")
    root = f"/run/kata-containers/{container.id}/rootfs"
    whole = spec(container.id, process("sh", "-c", "echo kept > /kept; grep ' / ' /proc/mounts"))
    whole.Root.Path = root
    storage = Storage(driver="blk", source=f"{port:02x}/00", fstype="ext4", mount_point=root)
    request = agent_pb2.CreateContainerRequest(
        container_id=container.id, exec_id=container.id, OCI=whole, storages=[storage]
    )
    creation = machine.client.begin("CreateContainer", request)
    with pytest.raises(TimeoutError):
        machine.client.answer(creation, timeout_s=0.5)
    # Others do not wait for it.
    quick = new_container()
    quick.run("true")
    assert quick.wait() == 0
    assert machine.plug_disk(disk, port=port) == storage.source
    machine.client.answer(creation)
    container.created = True
    container.start()
    assert b" / ext4 rw," in container.read_all()
    assert container.wait() == 0
    container.remove()
    machine.unplug_disk(port=port)
    assert content_of(disk, "/kept") == b"kept\n"


def test_a_disk_pulled_out_in_use_fails_and_does_not_hang(
    machine: GuestMachine, new_container: Callable[[], Life], tmp_path: Path
) -> None:
    rooted, using, port = new_container(), new_container(), 0x14
    tree = machine.share / rooted.id / "rootfs"
    root, volume = f"/run/kata-containers/{rooted.id}/rootfs", f"{VOLUMES}/pulled"
    for container, mount_point in ((rooted, root), (using, volume)):
        disk = make_disk(tmp_path / container.id, "ext4", size_mib=32, content=tree)
        place = machine.plug_disk(disk, port=port)
        whole = spec(container.id, process("cat"))
        if container is rooted:
            whole.Root.Path = root
        else:
            whole.Mounts.append(bound("/data", volume))
        storage = Storage(driver="blk", source=place, fstype="ext4", mount_point=mount_point)
        container.create_from(whole, storages=[storage])
        container.start()
        written = "/left" if container is rooted else "/data/left"
        container.execute("dirty", "dd", "if=/dev/zero", f"of={written}", "bs=1M", "count=2")
        assert container.wait("dirty") == 0
        machine.unplug_disk(port=port)
    using.execute("read", "cat", "/data/bin/busybox")
    assert b"Input/output error" in using.read_all("ReadStderr", "read")
    for container in (rooted, using):
        container.remove()
    # Nothing of it is left: the same slot, mount point and container serve again.
    again = make_disk(tmp_path / "again", "ext4", size_mib=32, content=tree)
    storage = Storage(
        driver="blk", source=machine.plug_disk(again, port=port), fstype="ext4", mount_point=volume
    )
    whole = spec(using.id, process("ls", "/data/bin/busybox"))
    whole.Mounts.append(bound("/data", volume))
    using.create_from(whole, storages=[storage])
    using.start()
    assert using.wait() == 0
    using.remove()
    machine.unplug_disk(port=port)
    check(again, "ext4")


def test_a_disk_is_a_device_of_one_container_alone(
    machine: GuestMachine, new_container: Callable[[], Life], tmp_path: Path
) -> None:
    container, other = new_container(), new_container()
    disk = tmp_path / "raw"
    disk.write_bytes(b"from the host".ljust(MIB, b"\0"))
    script = (
        "set -- $(stat -c '%t %T' /dev/given); echo $1 $2; dd if=/dev/given bs=13 count=1 2>/dev/null; cat"
    )
    whole = spec(container.id, process("sh", "-c", script))
    give_device(whole, "/dev/given", (8, 0))
    device = agent_pb2.Device(type="blk", id=machine.plug_disk(disk, port=0x13), container_path="/dev/given")
    container.create_from(whole, devices=[device])
    container.start()
    numbers, content = container.read_until(b"host").decode().split("\n")
    assert content == "from the host"
    major, minor = (int(number, 16) for number in numbers.split())
    whole = spec(
        other.id, process("sh", "-c", f"mknod /dev/x b {major} {minor} && echo made && dd if=/dev/x count=1")
    )
    whole.Process.Capabilities.Bounding.append("CAP_MKNOD")
    whole.Process.Capabilities.Permitted.append("CAP_MKNOD")
    whole.Process.Capabilities.Effective.append("CAP_MKNOD")
    rule = oci_pb2.LinuxDeviceCgroup
    whole.Linux.Resources.Devices.extend(
        [rule(Allow=False, Access="rwm"), rule(Allow=True, Type="b", Major=-1, Minor=-1, Access="m")]
    )
    other.create_from(whole)
    other.start()
    assert other.read_all() == b"made\n"
    assert b"Operation not permitted" in other.read_all("ReadStderr")
    other.remove()
    missing = agent_pb2.Device(type="blk", id="13/00", container_path="/dev/other")
    with pytest.raises(StatusError, match="/dev/other: not among the specification's devices"):
        new_container().create_from(spec("c-missing", process("true")), devices=[missing])


def give_device(whole: oci_pb2.Spec, path: str, host_number: tuple[int, int]) -> None:
    """List a disk in a specification as containerd does, with the host's numbers."""
    major, minor = host_number
    whole.Linux.Devices.append(oci_pb2.LinuxDevice(Path=path, Type="b", Major=major, Minor=minor))
    rule = oci_pb2.LinuxDeviceCgroup
    whole.Linux.Resources.Devices.extend(
        [
            rule(Allow=False, Access="rwm"),
            rule(Allow=True, Type="b", Major=major, Minor=minor, Access="rwm"),
        ]
    )


def test_a_kernel_module_is_loaded_with_its_parameters(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat", "/sys/module/virtio_net/parameters/napi_tx")
    assert container.read_all() == b"N\n"


def test_memory_volumes_are_shared_and_limited(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    first, second = new_container(), new_container()
    volume = "/run/kata-containers/sandbox/ephemeral/cache"
    storage = Storage(
        driver="ephemeral",
        source="tmpfs",
        fstype="tmpfs",
        mount_point=volume,
        options=["size=2m", "fsgid=77"],
    )
    for container in (first, second):
        whole = spec(container.id, process("cat"))
        whole.Mounts.append(bound("/cache", volume))
        container.create_from(whole, storages=[storage])
        container.start()
    fill = ("dd", "if=/dev/zero", "of=/cache/full", "bs=1M", "count=4")
    first.execute("fill", *fill)
    assert b"No space left" in first.read_all("ReadStderr", "fill")
    second.execute("look", "stat", "-c", "%s %g", "/cache/full")
    assert second.read_all(exec_id="look") == b"2097152 77\n"
    larger = Storage(driver="ephemeral", source="tmpfs", mount_point=volume, options=["remount", "size=6m"])
    machine.client.call("UpdateEphemeralMounts", agent_pb2.UpdateEphemeralMountsRequest(storages=[larger]))
    second.execute("refill", *fill)
    assert second.wait("refill") == 0
    for container in (first, second):
        container.remove()
    # It belongs to the pod: a container that starts again finds what it left.
    assert volume_bytes(machine, volume) == 6 * MIB


def test_an_update_of_a_configuration_reaches_the_container(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    container = new_container()
    source = machine.share / "settings"
    source.mkdir()
    publish(source, "..v1", {"colour": "red", "shape": "round"})
    target = "/run/kata-containers/sandbox/watchable/settings"
    storage = Storage(driver="watchable-bind", source=f"{SHARE}/settings", fstype="bind", mount_point=target)
    whole = spec(container.id, process("cat"))
    whole.Mounts.append(bound("/etc/settings", target, "ro"))
    container.create_from(whole, storages=[storage])
    container.start()

    def seen(number: int) -> str:
        name = f"look{number}"
        container.execute(name, "sh", "-c", "cd /etc/settings && ls -a && cat *")
        return container.read_all(exec_id=name).decode()

    assert seen(0).split() == [".", "..", "..data", "..v1", "colour", "shape", "redround"]
    publish(source, "..v2", {"colour": "blue", "size": "big"})
    deadline, number = time.monotonic() + UPDATE_TIMEOUT_S, 1
    # As on a host, the version changes at once and its names one after another.
    while (shown := seen(number)).split() != [".", "..", "..data", "..v2", "colour", "size", "bluebig"]:
        assert time.monotonic() < deadline, shown
        number += 1

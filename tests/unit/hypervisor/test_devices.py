"""Devices are described to QEMU, and their state follows its answers and events."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Disk, DiskLimits, Nic, disks, nics, virtiofsd, vsock
from hypervisor.argv import KernelVsock, UserVsock
from hypervisor.devices import Command, Description, Devices
from hypervisor.disks import Disks, Names
from hypervisor.errors import HotplugError, QmpError
from tests.waiting import reached, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from hypervisor.qmp import QmpSession
    from tests.unit.hypervisor.conftest import Peer


TIMESTAMP = {"seconds": 1, "microseconds": 0}
OK: dict[str, Any] = {"return": {}}
NO = {"error": {"class": "GenericError", "desc": "not today"}}
NOT_FOUND = {"error": {"class": "DeviceNotFound", "desc": "no such device"}}
PATH: list[dict[str, Any]] = [
    {"return": 7 << 3},
    {"return": "/machine/peripheral/bus1/bus1"},
    {"return": 5 << 3},
    {"return": "/machine/q35/pcie.0"},
]
DEVICE = Description(
    id="d",
    driver="virtio-x-pci",
    properties={"backend": "b"},
    backend=[Command("make", {"id": "b"})],
    undo=[Command("unmake", {"id": "b"})],
)
ADDED = [
    ("make", {"id": "b"}),
    ("device_add", {"driver": "virtio-x-pci", "backend": "b", "id": "d", "bus": "bus1", "addr": "1"}),
]
ASKED = ("device_del", {"id": "d"})
UNDONE = ("unmake", {"id": "b"})


def test_a_network_interface_is_described() -> None:
    description = nics.describe(Nic(id="n", mac="02:00:00:00:00:01", tap_fds=(3,)), fd_names=["fd0"])
    assert description == Description(
        id="n",
        driver="virtio-net-pci",
        properties={"netdev": "n-tap", "mac": "02:00:00:00:00:01", "disable-legacy": "on", "romfile": ""},
        backend=[Command("netdev_add", {"type": "tap", "id": "n-tap", "fds": "fd0"})],
        undo=[Command("netdev_del", {"id": "n-tap"})],
    )


def socket_chardev(name: str) -> Command:
    return Command(
        "chardev-add",
        {
            "id": name,
            "backend": {
                "type": "socket",
                "data": {"addr": {"type": "fd", "data": {"str": "fd0"}}, "server": False},
            },
        },
    )


def test_the_share_is_described() -> None:
    assert virtiofsd.describe("fd0") == Description(
        id="share",
        driver="vhost-user-fs-pci",
        properties={"chardev": "share", "tag": "kataShared", "queue-size": 1024},
        backend=[socket_chardev("share")],
        undo=[Command("chardev-remove", {"id": "share"})],
    )


@pytest.mark.parametrize(
    ("device", "description"),
    [
        pytest.param(
            KernelVsock(fd=9, cid=4711),
            Description(
                id="vsock",
                driver="vhost-vsock-pci",
                properties={"vhostfd": "fd0", "guest-cid": 4711},
                backend=[],
                undo=[],
            ),
            id="kernel",
        ),
        pytest.param(
            UserVsock(fd=9),
            Description(
                id="vsock",
                driver="vhost-user-vsock-pci",
                properties={"chardev": "vsock"},
                backend=[socket_chardev("vsock")],
                undo=[Command("chardev-remove", {"id": "vsock"})],
            ),
            id="daemon",
        ),
    ],
)
def test_the_agents_channel_is_described(device: KernelVsock | UserVsock, description: Description) -> None:
    assert vsock.describe(device, "fd0") == description


def test_each_queue_of_a_network_interface_has_its_vectors() -> None:
    description = nics.describe(Nic(id="n", mac="02:00:00:00:00:01", tap_fds=(3, 4)), fd_names=["fd0", "fd1"])
    assert description.backend[0].arguments["fds"] == "fd0:fd1"
    assert (description.properties["mq"], description.properties["vectors"]) == (True, 6)


DISK = Disk(
    id="d",
    path=Path("/volume"),
    serial="s",
    read_only=True,
    discard=False,
    limits=DiskLimits(read_iops=1, write_iops=2, read_bytes_per_s=3, write_bytes_per_s=4),
)


def test_a_disk_is_described() -> None:
    description = disks.describe(DISK, Names(4), block_device=True, aio="io_uring")
    access = {"read-only": True, "discard": "ignore"}
    assert description == Description(
        id="d",
        driver="virtio-blk-pci",
        properties={
            "drive": "disk4",
            "iothread": "disk4-thread",
            "serial": "s",
            "discard": False,
            "disable-legacy": "on",
            "werror": "report",
            "rerror": "report",
        },
        backend=[
            Command("object-add", {"qom-type": "iothread", "id": "disk4-thread"}),
            Command(
                "object-add",
                {
                    "qom-type": "throttle-group",
                    "id": "disk4-limits",
                    "limits": {"iops-read": 1, "iops-write": 2, "bps-read": 3, "bps-write": 4},
                },
            ),
            Command(
                "blockdev-add",
                {
                    "driver": "host_device",
                    "node-name": "disk4-file",
                    "filename": "/dev/fdset/4",
                    "aio": "io_uring",
                    **access,
                },
            ),
            Command(
                "blockdev-add",
                {
                    "driver": "throttle",
                    "node-name": "disk4",
                    "throttle-group": "disk4-limits",
                    "file": "disk4-file",
                    **access,
                },
            ),
        ],
        undo=[
            Command("blockdev-del", {"node-name": "disk4"}),
            Command("blockdev-del", {"node-name": "disk4-file"}),
            Command("object-del", {"id": "disk4-limits"}),
            Command("object-del", {"id": "disk4-thread"}),
            Command("remove-fd", {"fdset-id": 4}),
        ],
    )


@pytest.fixture
async def plugging(connected: tuple[QmpSession, Peer]) -> AsyncIterator[tuple[Devices, Peer]]:
    """Devices of a session, tracked as in a virtual machine."""
    session, peer = connected
    devices = Devices(session, buses=["bus1"], ports=["port1"])
    watching = asyncio.create_task(devices.watch())
    await settle()
    yield devices, peer
    watching.cancel()
    await asyncio.wait([watching])


async def plugged(devices: Devices, peer: Peer) -> list[tuple[str, dict[str, Any]]]:
    answering = asyncio.create_task(peer.serve(OK, OK, *PATH))
    assert await devices.plug(DEVICE) == "05/07"
    return await answering


async def forgotten(devices: Devices) -> None:
    await reached(lambda: not devices._plugged)


async def report(peer: Peer, event: str, **data: str) -> None:
    await peer.send({"event": event, "data": data, "timestamp": TIMESTAMP})


async def test_a_device_is_added_after_its_backend_and_its_pci_path_is_returned(
    plugging: tuple[Devices, Peer],
) -> None:
    devices, peer = plugging
    commands = await plugged(devices, peer)
    assert commands[:2] == ADDED
    assert commands[2] == ("qom-get", {"path": "/machine/peripheral/d", "property": "addr"})
    assert commands[4] == ("qom-get", {"path": "/machine/peripheral/bus1", "property": "addr"})


@pytest.mark.parametrize("answers", [[NO], [OK, NO]], ids=["backend", "device"])
async def test_a_refused_device_leaves_nothing_behind(
    plugging: tuple[Devices, Peer], answers: list[dict[str, dict[str, Any]]]
) -> None:
    devices, peer = plugging
    answering = asyncio.create_task(peer.serve(*answers, NOT_FOUND, OK))
    with pytest.raises(HotplugError, match=r"plug: d: .*not today"):
        await devices.plug(DEVICE)
    assert await answering == [*ADDED[: len(answers)], ASKED, UNDONE]
    await plugged(devices, peer)  # in the same slot


async def test_a_device_is_gone_only_when_qemu_says_so(plugging: tuple[Devices, Peer]) -> None:
    devices, peer = plugging
    await plugged(devices, peer)
    leaving = asyncio.create_task(devices.unplug("d", timeout_s=10))
    assert await peer.serve(OK) == [ASKED]
    await report(peer, "DEVICE_DELETED", path="/machine/peripheral/d/virtio-backend")
    await settle()
    assert not leaving.done()
    await report(peer, "DEVICE_DELETED", device="d", path="/machine/peripheral/d")
    assert await peer.serve(OK) == [UNDONE]
    await leaving
    await plugged(devices, peer)


async def test_a_guest_that_refuses_is_an_error_and_may_be_asked_again(
    plugging: tuple[Devices, Peer],
) -> None:
    devices, peer = plugging
    await plugged(devices, peer)
    leaving = asyncio.create_task(devices.unplug("d", timeout_s=10))
    await peer.serve(OK)
    await report(peer, "DEVICE_UNPLUG_GUEST_ERROR", device="d", path="/machine/peripheral/d")
    with pytest.raises(HotplugError, match="unplug: d: the guest refused"):
        await leaving
    leaving = asyncio.create_task(devices.unplug("d", timeout_s=10))
    await peer.serve(OK)
    await report(peer, "DEVICE_DELETED", device="d", path="/machine/peripheral/d")
    await peer.serve(OK)
    await leaving


async def test_a_silent_guest_is_an_error_and_the_slot_is_free_if_it_answers_later(
    plugging: tuple[Devices, Peer],
) -> None:
    devices, peer = plugging
    await plugged(devices, peer)
    answering = asyncio.create_task(peer.serve(OK))
    with pytest.raises(HotplugError, match=r"d: the guest did not let go of it within 0\.1 s"):
        await devices.unplug("d", timeout_s=0.1)
    await answering
    await report(peer, "DEVICE_DELETED", device="d", path="/machine/peripheral/d")
    assert await peer.serve(OK) == [UNDONE]
    await forgotten(devices)
    await plugged(devices, peer)


async def test_a_repeated_unplug_still_waits_for_the_device(plugging: tuple[Devices, Peer]) -> None:
    devices, peer = plugging
    await plugged(devices, peer)
    leaving = asyncio.create_task(devices.unplug("d", timeout_s=10))
    again = {"class": "GenericError", "desc": "Device d is already in the process of unplug"}
    await peer.serve({"error": again})
    await report(peer, "DEVICE_DELETED", device="d", path="/machine/peripheral/d")
    await peer.serve(OK)
    await leaving


async def test_a_device_that_the_guest_ejected_by_itself_is_forgotten(plugging: tuple[Devices, Peer]) -> None:
    devices, peer = plugging
    await plugged(devices, peer)
    answering = asyncio.create_task(peer.serve(NOT_FOUND, OK))
    await devices.unplug("d", timeout_s=10)
    assert await answering == [ASKED, UNDONE]


async def test_a_cancelled_plug_is_undone_once_the_guest_releases_the_device(
    plugging: tuple[Devices, Peer],
) -> None:
    devices, peer = plugging
    giving_up = asyncio.create_task(devices.plug(DEVICE))
    await peer.serve(OK)
    late = await peer.receive()
    giving_up.cancel()
    await settle()
    await peer.send({"return": {}, "id": late["id"]})
    assert await peer.serve(OK) == [ASKED]
    with pytest.raises(asyncio.CancelledError):
        await giving_up
    with pytest.raises(HotplugError, match="no such device"):
        await devices.unplug("d", timeout_s=1)
    await report(peer, "DEVICE_DELETED", device="d", path="/machine/peripheral/d")
    assert await peer.serve(OK) == [UNDONE]
    await forgotten(devices)
    await plugged(devices, peer)


async def test_the_end_of_the_session_ends_a_plug(plugging: tuple[Devices, Peer]) -> None:
    devices, peer = plugging
    plug = asyncio.create_task(devices.plug(DEVICE))
    await peer.receive()
    peer.hang_up()
    with pytest.raises(QmpError):
        await plug


async def test_a_failing_disk_is_logged_once_under_its_own_name(
    plugging: tuple[Devices, Peer], caplog: pytest.LogCaptureFixture
) -> None:
    devices, peer = plugging
    disk = disks.describe(DISK, Names(4), block_device=False, aio="threads")
    answering = asyncio.create_task(peer.serve(OK, OK, OK, OK, OK, *PATH))
    await devices.plug(disk)
    await answering
    other = {"node-name": "disk5", "operation": "read", "reason": "Input/output error"}
    for data in (other, {**other, "node-name": "disk4"}, {**other, "node-name": "disk4"}, {}):
        await report(peer, "BLOCK_IO_ERROR", action="report", **data)
    peer.hang_up()
    await devices._session.drained()
    await settle()
    assert caplog.messages == ["disk d: read: Input/output error; the guest was given an I/O error"]


async def test_a_failed_cleanup_is_logged(
    plugging: tuple[Devices, Peer], caplog: pytest.LogCaptureFixture
) -> None:
    devices, peer = plugging
    await plugged(devices, peer)
    leaving = asyncio.create_task(devices.unplug("d", timeout_s=10))
    await peer.serve(OK)
    await report(peer, "DEVICE_DELETED", device="d", path="/machine/peripheral/d")
    with caplog.at_level(logging.WARNING):
        await peer.serve(NO)
        await leaving
    assert "unplug: d: something stays behind: qmp: unmake: not today" in caplog.text


async def test_a_qemu_without_io_uring_uses_threads_for_all_later_disks(
    plugging: tuple[Devices, Peer], tmp_path: Path
) -> None:
    devices, peer = plugging
    path = tmp_path / "image"
    path.touch()
    disk = Disk(id="d", path=path, serial="", read_only=False, discard=False, limits=DiskLimits())
    refusal = {"class": "GenericError", "desc": "Parameter 'aio' does not accept value 'io_uring'"}
    plug = asyncio.create_task(Disks(devices._session, devices).plug(disk))
    given_up = [OK, OK, OK, {"error": refusal}, NOT_FOUND, NO, NO, OK, OK, OK, NO]
    commands = await peer.serve(*given_up, OK, OK, OK, OK, OK, OK, *PATH)
    assert await plug == "05/07"
    tried = [arguments["aio"] for command, arguments in commands if "aio" in arguments]
    assert tried == ["io_uring", "threads"]

"""The host's kernel moves a network interface's packets if it can; otherwise QEMU does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Nic, nics
from hypervisor.devices import Devices
from hypervisor.errors import HotplugError
from tests.descriptors import descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from hypervisor.qmp import QmpSession
    from tests.unit.hypervisor.conftest import Peer


OK: dict[str, Any] = {"return": {}}
NO: dict[str, Any] = {
    "error": {"class": "GenericError", "desc": "vhost-net requested but could not be initialized"}
}
FULL = {"error": {"class": "GenericError", "desc": "could not configure /dev/net/tun"}}
NOT_FOUND = {"error": {"class": "DeviceNotFound", "desc": "no such device"}}
PATH: list[dict[str, Any]] = [
    {"return": 7 << 3},
    {"return": "/machine/peripheral/bus1/bus1"},
    {"return": 5 << 3},
    {"return": "/machine/q35/pcie.0"},
]
BACKEND = {"type": "tap", "id": "n-tap"}


@pytest.fixture
def taps() -> Iterator[tuple[int, int]]:
    opened = os.open("/dev/null", os.O_RDWR), os.open("/dev/null", os.O_RDWR)
    yield opened
    for fd in opened:
        os.close(fd)


@pytest.fixture
def vhost_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nics, "_VHOST_NET", Path("/dev/zero"))


async def plugged(
    connected: tuple[QmpSession, Peer], taps: tuple[int, int], *answers: dict[str, Any]
) -> tuple[HotplugError | str, list[dict[str, Any]]]:
    """Plug a card with two queue pairs; return the outcome and the description of its backend."""
    session, peer = connected
    devices = Devices(session, buses=["bus1"], ports=[])
    before = descriptors()
    plugging = nics.plug(Nic(id="n", mac="02:00:00:00:00:01", tap_fds=taps), session=session, devices=devices)
    outcome, commands = await asyncio.gather(plugging, peer.serve(*answers), return_exceptions=True)
    assert descriptors() <= before
    return outcome, [arguments for name, arguments in commands if name == "netdev_add"]


async def test_the_kernel_moves_the_packets_with_one_descriptor_for_each_pair(
    connected: tuple[QmpSession, Peer], taps: tuple[int, int], vhost_net: None
) -> None:
    outcome, backends = await plugged(connected, taps, *[OK] * 6, *PATH)
    assert outcome == "05/07"
    assert backends == [{**BACKEND, "fds": "fd0:fd1", "vhost": True, "vhostfds": "fd2:fd3"}]


async def test_qemu_moves_the_packets_on_a_host_without_vhost_net(
    connected: tuple[QmpSession, Peer], taps: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nics, "_VHOST_NET", tmp_path / "vhost-net")
    outcome, backends = await plugged(connected, taps, *[OK] * 4, *PATH)
    assert outcome == "05/07"
    assert backends == [{**BACKEND, "fds": "fd0:fd1"}]


async def test_qemu_moves_the_packets_if_the_kernel_refuses(
    connected: tuple[QmpSession, Peer],
    taps: tuple[int, int],
    vhost_net: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Sent, refused and taken back (device, backend, four descriptors), then sent again without vhost-net.
    first = [*[OK] * 4, NO, NOT_FOUND, NOT_FOUND, *[OK] * 4]
    outcome, backends = await plugged(connected, taps, *first, *[OK] * 4, *PATH)
    assert outcome == "05/07"
    assert backends[1] == {**BACKEND, "fds": "fd4:fd5"}
    assert "QEMU moves its packets, not the kernel" in caplog.text


async def test_another_refusal_is_not_tried_again(
    connected: tuple[QmpSession, Peer], taps: tuple[int, int], vhost_net: None
) -> None:
    outcome, backends = await plugged(connected, taps, *[OK] * 4, FULL, NOT_FOUND, NOT_FOUND, *[OK] * 4)
    assert isinstance(outcome, HotplugError)
    assert len(backends) == 1

"""The network of a pod: within it, from pod to pod over the bridge, and from the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cri import peer
from tests.cri.image import PORT
from tests.cri.stack import GATEWAYS, inside

if TYPE_CHECKING:
    from tests.cri.conftest import Duo

NEWEST = pytest.mark.mainly("2.1-podsandbox")
# A pod's network is a namespace that containerd names in one of two ways.
pytestmark = pytest.mark.mainly("2.1-podsandbox", "2.1-shim")
MIB = 1 << 20
LARGEST_DATAGRAM = 1400
SIZES = pytest.mark.parametrize(
    "size",
    [
        pytest.param(4 * MIB, id="4M"),
        pytest.param(64 * MIB, id="64M", marks=NEWEST),
        pytest.param(1024 * MIB, id="1G", marks=[pytest.mark.nightly, pytest.mark.timeout(1200)]),
    ],
)


def test_containers_of_a_pod_talk_over_localhost(duo: Duo) -> None:
    hosts = ["127.0.0.1", "::1"]
    assert duo.worker.peer("greet", LARGEST_DATAGRAM, *hosts) == hosts


def test_a_pod_reaches_another_one_which_sees_its_address(duo: Duo) -> None:
    addresses = duo.pod.addresses()
    for address in addresses:
        pinged = duo.caller.exec("ping", "-c", "2", "-i", "0.2", "-W", "60", address)
        assert "2 packets received" in pinged.stdout
    assert duo.caller.peer("greet", LARGEST_DATAGRAM, *addresses) == list(duo.neighbour.addresses())


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_the_host_reaches_a_pod(duo: Duo, family: int) -> None:
    address = duo.pod.addresses()[family]
    with inside(duo.pod.stack.network):
        assert peer.datagram(address, PORT, LARGEST_DATAGRAM)
        assert peer.ask(address, PORT, "whence") == GATEWAYS[family]


@SIZES
def test_pods_exchange_data_without_loss(duo: Duo, size: int) -> None:
    address, _ = duo.pod.addresses()
    assert duo.caller.peer("upload", size, address, timeout_s=1000) == [peer.pattern_hash(size)]


@SIZES
def test_the_host_and_a_pod_exchange_data_without_loss(duo: Duo, size: int) -> None:
    expected = peer.pattern_hash(size)
    _, address = duo.pod.addresses()
    with inside(duo.pod.stack.network):
        assert peer.upload(address, PORT, size) == expected
        assert peer.download(address, PORT, size) == expected


def test_containers_see_the_names_that_the_pod_was_given(duo: Duo) -> None:
    for container in (duo.server, duo.worker):
        assert container.exec("hostname").stdout == "duo\n"
        assert container.exec("cat", "/etc/resolv.conf").stdout.splitlines() == [
            "search tests.example",
            "nameserver 192.0.2.53",
            "options ndots:3",
        ]

"""The network of a pod: within it, from pod to pod over the bridge, and from the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cri import peer
from tests.cri.conftest import PORT
from tests.cri.stack import inside

if TYPE_CHECKING:
    from tests.cri.conftest import Duo

MIB = 1 << 20
LARGEST_DATAGRAM = 1400
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
SIZES = pytest.mark.parametrize(
    "size", [pytest.param(64 * MIB, id="64M"), pytest.param(1024 * MIB, id="1G", marks=pytest.mark.nightly)]
)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_containers_of_a_pod_talk_over_localhost(duo: Duo, address: str) -> None:
    assert duo.worker.peer("ask", address, PORT, "echo hello") == "hello"
    assert duo.worker.peer("datagram", address, PORT, LARGEST_DATAGRAM) == "True"


@FAMILIES
def test_a_pod_reaches_another_one(duo: Duo, family: int) -> None:
    address = duo.pod.addresses()[family]
    assert duo.caller.exec("ping", "-c", "2", "-W", "5", address).code == 0
    assert duo.caller.peer("datagram", address, PORT, LARGEST_DATAGRAM) == "True"
    assert duo.caller.peer("ask", address, PORT, "echo hello") == "hello"
    assert duo.caller.peer("ask", address, PORT, "whence") == duo.neighbour.addresses()[family]


@FAMILIES
def test_the_host_reaches_a_pod(duo: Duo, family: int) -> None:
    address = duo.pod.addresses()[family]
    with inside(duo.pod.stack.network):
        assert peer.ask(address, PORT, "echo hello") == "hello"
        assert peer.datagram(address, PORT, LARGEST_DATAGRAM)


@SIZES
@pytest.mark.timeout(1200)
def test_what_pods_send_arrives_whole(duo: Duo, size: int) -> None:
    address, _ = duo.pod.addresses()
    assert duo.caller.peer("upload", address, PORT, size, timeout_s=900) == peer.pattern_hash(size)


@SIZES
@pytest.mark.timeout(1200)
def test_what_the_host_and_a_pod_send_arrives_whole(duo: Duo, size: int) -> None:
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

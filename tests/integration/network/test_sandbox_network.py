"""The host's side of a sandbox's network on a real kernel; the machine is a test that reads the taps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.agent.oci_namespaces import WantedNamespace
from shim.errors import FailedPrecondition, Internal, InvalidArgument
from shim.host.ledger import Ledger
from shim.network.namespace import NetworkNamespace
from shim.network.network import Network
from shim.network.tap import open_tap
from tests.network_space import Space, add_cable
from tests.patience import patient

from .machine import Machine, attach, network_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


HEADER = bytes(10)  # virtio_net_hdr of a packet without checksum or segmentation wishes
ETHERTYPE = 0x88B5  # IEEE 802: free for experiments
TEXT = b"a frame of this test"
DEADLINE_S = patient(60.0)
HOST = Path("/proc/self/ns/net")
HOST_NUMBER = HOST.stat().st_ino


async def test_the_machine_gets_a_card_for_the_interface_and_the_guest_its_configuration(
    pod: Space, ledger: Ledger, machine: Machine
) -> None:
    pod.ip("neigh add 10.1.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent")
    async with network_of(pod, ledger) as network:
        await attach(network, machine)

        [card] = machine.cards.values()
        interface, routes, neighbours = machine.told
        assert (interface.name, interface.mtu, interface.devicePath) == ("eth0", 1400, "02/01")
        assert card.mac == interface.hwAddr
        assert f"link/ether {card.mac} " in pod.ip("link show eth0")
        assert [f"{each.address}/{each.mask}" for each in interface.IPAddresses] == [
            "10.1.0.2/24",
            "fd00:1::2/64",
        ]
        assert {(each.dest, each.gateway) for each in routes.Routes} == {("", "10.1.0.1"), ("", "fe80::1")}
        assert [each.lladdr for each in neighbours.ARPNeighbors] == ["02:00:00:00:00:01"]


@contextlib.asynccontextmanager
async def far_end(kind: str, pod: Space, outside: Space) -> AsyncIterator[tuple[int, int]]:
    """Give the pod one interface, and open its other end.

    :returns: a descriptor to read and write frames, and how many bytes precede each.
    """
    if kind == "tap":
        [descriptor] = pod.inside(lambda: open_tap("net1", queues=1))
        pod.ip("link set net1 addrgenmode none up")
        yield descriptor, len(HEADER)
        os.close(descriptor)
        return
    if kind == "veth":
        add_cable(pod, outside, "far", number=1)
    else:
        outside.ip("link add near type veth peer name far")
        outside.ip("link set near up")
        outside.ip("link set far up")
        outside.ip(f"link add link near name net1 netns {pod.pid} type {kind} mode bridge")
        pod.ip("link set net1 addrgenmode none up")
        # Until then the kernel drops what is sent.
        for space, name in ((outside, "near"), (outside, "far"), (pod, "net1")):
            space.wait_for(" state UP ", f"link show {name}")

    def capture() -> socket.socket:
        opened = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ETHERTYPE)
        )
        opened.bind(("far", ETHERTYPE))
        return opened

    with outside.inside(capture) as opened:
        yield opened.fileno(), 0


async def receive(*descriptors: int) -> bytes:
    """Read the next frame of the test's own protocol, without what precedes it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    for descriptor in descriptors:
        loop.add_reader(descriptor, readable.set)
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                await readable.wait()
                readable.clear()
                for descriptor in descriptors:
                    with contextlib.suppress(BlockingIOError):
                        while frame := os.read(descriptor, 65536):
                            if TEXT in frame:
                                return frame
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)


@pytest.mark.parametrize(
    "case", [("veth", 1), ("veth", 2), ("macvlan", 1), ("macvtap", 1), ("tap", 1)], ids=str
)
async def test_frames_go_from_card_to_cable_and_back(
    empty_pod: Space, outside: Space, ledger: Ledger, machine: Machine, case: tuple[str, int]
) -> None:
    kind, queues = case
    async with (
        far_end(kind, empty_pod, outside) as (far, skipped),
        network_of(empty_pod, ledger, queues=queues) as network,
    ):
        await attach(network, machine)
        [card] = machine.cards.values()
        near = machine.queues[card.id]
        assert len(near) == queues
        mac = bytes.fromhex(card.mac.replace(":", ""))
        there = b"\xff" * 6 + mac + ETHERTYPE.to_bytes(2, "big") + TEXT.ljust(50)
        back = mac + b"\x02" + bytes(5) + ETHERTYPE.to_bytes(2, "big") + TEXT.ljust(50)

        os.write(near[0], HEADER + there)
        assert (await receive(far))[skipped:] == there
        os.write(far, HEADER[:skipped] + back)
        assert (await receive(*near))[len(HEADER) :] == back


def ipv4(source: str, destination: str, *, tags: tuple[int, ...] = ()) -> bytes:
    """A frame with an IPv4 packet, from the first byte after the hardware addresses, below VLAN tags."""
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(TEXT),
        0,
        0,
        64,
        253,
        0,
        *map(socket.inet_aton, (source, destination)),
    )
    return b"".join(struct.pack("!HH", tag, 0) for tag in tags) + b"\x08\x00" + header + TEXT


@pytest.mark.parametrize("tags", [(), (0x8100,), (0x88A8, 0x8100), (0x8100, 0x8100, 0x8100)], ids=str)
async def test_a_packet_from_outside_does_not_reach_the_guests_localhost(
    empty_pod: Space, outside: Space, ledger: Ledger, machine: Machine, tags: tuple[int, ...]
) -> None:
    async with far_end("veth", empty_pod, outside) as (far, _), network_of(empty_pod, ledger) as network:
        await attach(network, machine)
        [card] = machine.cards.values()
        addresses = bytes.fromhex(card.mac.replace(":", "")) + b"\x02" + bytes(5)
        os.write(far, addresses + ipv4("10.1.0.1", "127.0.0.1", tags=tags))
        os.write(far, addresses + ipv4("169.254.255.254", "127.9.9.9", tags=tags))
        usual = addresses + ipv4("10.1.0.1", "10.1.0.2")
        os.write(far, usual)

        assert (await receive(*machine.queues[card.id]))[len(HEADER) :] == usual


async def test_a_connection_to_localhost_in_the_namespace_reaches_the_guest(
    pod: Space, ledger: Ledger, machine: Machine
) -> None:
    async with network_of(pod, ledger) as network:
        machine.is_hako = True
        await attach(network, machine)
        [card] = machine.cards.values()
        [queue] = machine.queues[card.id]
        with pod.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as opened:
            opened.settimeout(DEADLINE_S)
            opened.sendto(TEXT, ("127.0.0.1", 7000))
            frame = (await receive(queue))[len(HEADER) :]
            assert frame[:6] == bytes.fromhex(card.mac.replace(":", ""))
            source, destination = frame[26:30], frame[30:34]
            assert destination == socket.inet_aton("127.0.0.1")
            ports = frame[36:38] + frame[34:36]
            answer = TEXT[::-1]
            header = struct.pack(
                "!BBHHHBBH4s4s", 0x45, 0, 28 + len(answer), 0, 0, 64, 17, 0, destination, source
            )
            checked = header[:10] + checksum(header) + header[12:]
            datagram = ports + struct.pack("!HH", 8 + len(answer), 0) + answer
            os.write(queue, HEADER + frame[6:12] + frame[:6] + b"\x08\x00" + checked + datagram)
            assert opened.recv(99) == answer
        *_, routes, neighbours = machine.told
        assert [(each.dest, each.device, each.source) for each in routes.Routes if each.source] == [
            ("169.254.255.254/32", "eth0", "127.0.0.1")
        ]
        assert [bytes.fromhex(each.lladdr.replace(":", "")) for each in neighbours.ARPNeighbors] == [
            frame[6:12]
        ]


def checksum(header: bytes) -> bytes:
    """The checksum of an IPv4 header in which it is 0 (RFC 791)."""
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


async def test_detaching_leaves_the_namespace_as_it_was(pod: Space, ledger: Ledger, machine: Machine) -> None:
    before = pod.configuration()
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        assert pod.configuration() != before
        machine.die()
    assert pod.configuration() == before
    assert ledger.entries() == []


@pytest.mark.parametrize("step", ["plug", "interface"])
async def test_a_refusal_of_the_machine_leaves_the_namespace_as_it_was(
    pod: Space, ledger: Ledger, machine: Machine, step: str
) -> None:
    before = pod.configuration()
    machine.refuses = step
    async with network_of(pod, ledger) as network:
        with pytest.raises(Internal, match=r"no slot is free|Link not found"):
            await attach(network, machine)
        assert (machine.cards, machine.queues) == ({}, {})
        assert pod.configuration() == before


async def test_an_interface_that_cannot_be_connected_takes_the_others_back(
    pod: Space, outside: Space, ledger: Ledger, machine: Machine
) -> None:
    add_cable(pod, outside, "net1", number=2)
    pod.run("tc", "qdisc", "add", "dev", "net1", "ingress")
    before = pod.configuration()
    async with network_of(pod, ledger) as network:
        with pytest.raises(FailedPrecondition, match=r"^network: net1: .* redirected already"):
            await network.prepare()
        assert pod.configuration() == before
    assert ledger.entries() == []


async def test_a_second_machine_in_one_namespace_is_refused_and_harms_nothing(
    pod: Space, ledger: Ledger, machine: Machine
) -> None:
    async with network_of(pod, ledger) as network, network_of(pod, ledger) as second:
        await attach(network, machine)
        before = pod.configuration()
        with pytest.raises(FailedPrecondition, match=r"^network: eth0: "):
            await second.prepare()
        assert pod.configuration() == before


async def test_an_interface_of_another_kind_is_refused_by_name(pod: Space, ledger: Ledger) -> None:
    pod.ip("link add br0 type bridge")
    pod.ip("link set br0 up")
    async with network_of(pod, ledger) as network:
        with pytest.raises(InvalidArgument, match=r"^network: br0: a bridge "):
            await network.prepare()


async def test_a_namespace_without_interfaces_needs_nothing(
    empty_pod: Space, ledger: Ledger, machine: Machine
) -> None:
    async with network_of(empty_pod, ledger) as network:
        await attach(network, machine)
    assert (machine.cards, machine.told) == ({}, [])


async def test_after_a_crash_the_ledger_gives_the_namespace_back(
    pod: Space, state_directory: Path, machine: Machine
) -> None:
    before = pod.configuration()
    ledger = Ledger(str(state_directory), create=True)
    network = await Network.open(WantedNamespace(pod.path), ledger=ledger, queues=1)
    await attach(network, machine)
    machine.die()
    ledger.close()
    network._namespace.close()
    assert "ingress" in pod.run("tc", "qdisc")

    after = Ledger(str(state_directory))
    assert after.undo_all(deadline_s=DEADLINE_S) == []
    after.close()
    assert pod.configuration() == before


async def test_the_ledger_spares_another_namespace_at_the_same_path(
    pod: Space, state_directory: Path
) -> None:
    pod.run("tc", "qdisc", "add", "dev", "eth0", "ingress")
    ledger = Ledger(str(state_directory), create=True)
    index = int(pod.ip("-oneline link show eth0").partition(":")[0])
    ledger.redirection(str(pod.path), namespace=1, interface=index)
    ledger.redirection(f"{state_directory}/gone", namespace=1, interface=index)
    assert ledger.undo_all(deadline_s=DEADLINE_S) == []
    ledger.close()
    assert "ingress" in pod.run("tc", "qdisc")


async def test_a_namespace_without_a_path_is_a_new_one_that_any_process_can_enter() -> None:
    namespace = await NetworkNamespace.open(WantedNamespace(None))
    try:
        assert namespace.number != HOST_NUMBER
        assert len(Space(namespace.path).ip("-oneline link").splitlines()) == 1
    finally:
        namespace.close()


async def test_the_network_of_the_host_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^network: namespace /proc/self/ns/net: it is the host's own"):
        await NetworkNamespace.open(WantedNamespace(HOST))


async def test_a_namespace_that_does_not_exist_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"^network: namespace {tmp_path}/x: No such file or directory"):
        await NetworkNamespace.open(WantedNamespace(tmp_path / "x"))


async def test_a_stock_agent_gets_dropping_routes_and_other_rules_are_logged(
    pod: Space, ledger: Ledger, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    pod.ip("route add blackhole 10.9.0.0/16")
    pod.ip("route add default via 10.1.0.1 table 100")
    pod.ip("rule add from 10.1.0.2 lookup 100")
    pod.set("net/core/somaxconn", "99")
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        pod.ip("addr add 10.1.0.9/32 dev eth0")
        await network.rescan(vm=machine.vm, agent=machine.agent)
    *_, routes = machine.told
    assert ("10.9.0.0/16", "lo") in {(each.dest, each.device) for each in routes.Routes}
    for named in (
        "route default table 100",
        "rule 32765: from 10.1.0.2/32 lookup 100",
        "net/core/somaxconn = 99",
    ):
        assert len([line for line in caplog.messages if line.startswith(f"network: {named}: ")]) == 1


DOCKERS = (
    "{} -t nat -N DOCKER_OUTPUT",
    "{} -t nat -A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT",
    "{} -t nat -A DOCKER_OUTPUT -p udp --dport 53 -j DNAT --to-destination 127.0.0.11:39547",
)


@pytest.mark.parametrize(
    "case",
    [
        (("iptables -A INPUT -p tcp --dport 80 -j DROP",), "packet filter (nftables or iptables-nft)"),
        (("ip6tables -P INPUT DROP",), "packet filter (nftables or iptables-nft)"),
        (("iptables-legacy -P OUTPUT DROP",), "packet filter (iptables)"),
        (("iptables-legacy -A INPUT -j ACCEPT",), "packet filter (iptables)"),
        (
            ("ip6tables-legacy -t nat -A PREROUTING -p tcp -j REDIRECT --to-ports 15001",),
            "packet filter (ip6tables)",
        ),
        (
            ("ip xfrm policy add src 10.0.0.0/8 dst 10.1.0.0/16 dir out action block",),
            "IPsec policies (XFRM)",
        ),
        ((*DOCKERS, "{} -t nat -A OUTPUT -p tcp -j RETURN"), "packet filter (nftables or iptables-nft)"),
        (("iptables -L", "iptables-legacy -t nat -L", *DOCKERS), ""),
    ],
    ids=str,
)
async def test_a_packet_filter_that_misses_the_guests_packets_is_named_once(
    pod: Space,
    ledger: Ledger,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    case: tuple[tuple[str, ...], str],
) -> None:
    commands, named = case
    for command in commands:
        program, *rest = command.format("iptables").split()
        pod.run(program, *(["-w"] if "tables" in program else []), *rest)
    async with network_of(pod, ledger) as network:
        await attach(network, machine)
        pod.ip("addr add 10.1.0.9/32 dev eth0")
        await network.rescan(vm=machine.vm, agent=machine.agent)
    found = [line for line in caplog.messages if "pass by" in line]
    assert len(found) == bool(named)
    assert all(named in line for line in found)

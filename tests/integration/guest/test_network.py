"""The guest's network, through a tap device in a separate network namespace."""

from __future__ import annotations

import hashlib
import math
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from proto import extensions_pb2
from proto.kata import agent_pb2, types_pb2
from tests.integration.guest.agent_client import StatusError
from tests.integration.guest.conftest import IMAGE, Life
from tests.integration.guest.guest_machine import GuestMachine, process, spec
from tests.network_space import Space, new_space
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST, SECOND = "02:00:00:00:00:01", "02:00:00:00:00:02"
PORTS = (0x10, 0x11)
FAR_V4, FAR_V6 = "198.51.100.1", "2001:db8:ff::1"
# A packet's answer, in whole seconds; and what a connection waits for at most.
ANSWER_S = math.ceil(patient(30))
CONNECTED_S = patient(100)
NOARP, PERMANENT, ONLINK, LINK_SCOPE = 0x80, 0x80, 4, 253


def address(text: str) -> types_pb2.IPAddress:
    literal, _slash, mask = text.partition("/")
    family = types_pb2.v6 if ":" in literal else types_pb2.v4
    return types_pb2.IPAddress(family=family, address=literal, mask=mask)


def interface(name: str, mac: str, *addresses: str, **fields: Any) -> agent_pb2.UpdateInterfaceRequest:
    values: dict[str, Any] = {
        "name": name,
        "hwAddr": mac,
        "mtu": 1500,
        "IPAddresses": map(address, addresses),
    }
    wanted = types_pb2.Interface(**values | fields)
    return agent_pb2.UpdateInterfaceRequest(interface=wanted)


class Pod:
    """A machine, the network namespace around it and calls about its interfaces."""

    def __init__(self, machine: GuestMachine, space: Space) -> None:
        self.machine = machine
        self.space = space
        self.client = machine.client

    def update(self, *arguments: str, **fields: Any) -> None:
        self.client.call("UpdateInterface", interface(*arguments, **fields))

    def ping(self, target: str) -> None:
        """Send it a single packet, which must be answered."""
        self.space.run("busybox", "ping", "-c1", f"-W{ANSWER_S}", target)

    def interfaces(self) -> dict[str, types_pb2.Interface]:
        listed = self.client.call("ListInterfaces", agent_pb2.ListInterfacesRequest()).Interfaces
        return {one.name: one for one in listed}

    def addresses(self, name: str) -> set[str]:
        """Return the addresses of an interface, except the link-local one that the kernel makes."""
        found = {f"{one.address}/{one.mask}" for one in self.interfaces()[name].IPAddresses}
        return {one for one in found if not one.startswith("fe80::ff:fe00:")}

    def update_routes(self, *routes: types_pb2.Route) -> list[types_pb2.Route]:
        wanted = agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=routes))
        return list(self.client.call("UpdateRoutes", wanted).Routes)

    def run(self, name: str, *args: str, sysctl: dict[str, str] | None = None) -> str:
        """Run a container to its end; return its output, errors included."""
        self.machine.make_rootfs(name)
        whole = spec(name, process("sh", "-c", " ".join(("exec 2>&1;", *args))))
        whole.Linux.Sysctl.update(sysctl or {})
        # The guest's own file, because the request has none.
        whole.Mounts.add(destination="/etc/resolv.conf", source="/etc/resolv.conf", options=["bind", "ro"])
        for capabilities in ("Bounding", "Effective", "Permitted"):
            getattr(whole.Process.Capabilities, capabilities).append("CAP_NET_RAW")
        container = Life(self.machine, name)
        container.create_from(whole)
        container.start()
        output = container.read_all().decode()
        assert container.wait() == 0, output
        container.remove()
        return output


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    with new_space() as space:
        for number in range(2):
            space.ip(f"tuntap add tap{number} mode tap vnet_hdr")
            space.ip(f"link set tap{number} up addrgenmode none")
            for version in ("ipv4", "ipv6"):
                # One question a second; after three the kernel gives up a machine that is slow to answer.
                space.run(
                    "busybox", "sysctl", "-w", f"net.{version}.neigh.tap{number}.mcast_solicit={ANSWER_S}"
                )
        for address in ("192.0.2.1/24 dev tap0", f"{FAR_V4}/32 dev lo"):
            space.ip(f"address add {address}")
        for address in ("2001:db8::1/64 dev tap0", "fe80::1/64 dev tap0", f"{FAR_V6}/128 dev lo"):
            space.ip(f"address add {address} nodad")
        machine = GuestMachine(
            tmp_path_factory.mktemp("network"), IMAGE, channel="serial", network_namespace=space.path
        )
        try:
            machine.create_sandbox()
            yield Pod(machine, space)
        finally:
            machine.close()


@pytest.fixture(scope="module")
def network(pod: Pod) -> Pod:
    """Plug the first interface while the agent already waits for it, and give it its routes."""
    path = f"{PORTS[0]:02x}/00"
    wanted = interface("eth0", FIRST, "192.0.2.2/24", "2001:db8::2/64", devicePath=path, mtu=1400)
    waiting = pod.client.begin("UpdateInterface", wanted)
    with pytest.raises(TimeoutError):
        pod.client.answer(waiting, timeout_s=0.5)
    assert pod.machine.plug_nic("tap0", mac=FIRST, port=PORTS[0]) == path
    reply = types_pb2.Interface.FromString(pod.client.answer(waiting))
    assert reply == wanted.interface
    route = types_pb2.Route
    pod.update_routes(
        route(gateway="fe80::1", device="eth0", family=types_pb2.v6),
        route(gateway="192.0.2.1", device="eth0"),
    )
    return pod


def test_a_plugged_interface_is_reached_at_once(network: Pod) -> None:
    # The very first packets: no duplicate address detection holds IPv6 back.
    network.ping("2001:db8::2")
    network.ping("192.0.2.2")
    shown = network.interfaces()["eth0"]
    assert (shown.hwAddr, shown.mtu) == (FIRST, 1400)
    assert network.addresses("eth0") == {"192.0.2.2/24", "2001:db8::2/64"}
    assert network.addresses("lo") == {"127.0.0.1/8", "::1/128"}


class Sink(threading.Thread):
    """Takes one connection and hashes what comes."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__()
        self._listener = listener
        self.received = ""

    def run(self) -> None:
        digest = hashlib.sha256()
        with self._listener, self._listener.accept()[0] as connection:
            connection.settimeout(CONNECTED_S)
            while part := connection.recv(65536):
                digest.update(part)
        self.received = digest.hexdigest()


@pytest.mark.parametrize(("family", "target"), [(socket.AF_INET, FAR_V4), (socket.AF_INET6, FAR_V6)])
def test_a_container_sends_through_the_default_route(network: Pod, family: int, target: str) -> None:
    listener = network.space.inside(lambda: socket.create_server((target, 0), family=family))
    listener.settimeout(CONNECTED_S)
    port = listener.getsockname()[1]
    sink = Sink(listener)
    sink.start()
    output = network.run(
        f"send-{int(family)}",
        "dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null;",
        f"nc {target} {port} < /tmp/data; sha256sum < /tmp/data;",
        f"ping -c1 -W{ANSWER_S} {target} >/dev/null && echo pong",
    )
    sink.join()
    assert output.split() == [sink.received, "-", "pong"]


def test_containers_share_the_machine_s_network(network: Pod) -> None:
    network.client.call(
        "AddARPNeighbors",
        agent_pb2.AddARPNeighborsRequest(
            neighbors=agent_pb2.ARPNeighbors(
                ARPNeighbors=[
                    types_pb2.ARPNeighbor(
                        toIPAddress=address(text), device="eth0", lladdr="02:00:00:00:00:99", state=PERMANENT
                    )
                    for text in ("192.0.2.9", "2001:db8::9")
                ]
            )
        ),
    )
    output = network.run(
        # A name that is also a directory's of the protocol.
        "shared",
        "ls /sys/class/net; cat /sys/class/net/eth0/mtu /proc/sys/net/ipv4/conf/eth0/accept_local;",
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ip neigh show nud permanent | cut -d' ' -f1-5;",
        # The flags: permanent, no detection of duplicates; none is tentative (0x40).
        "grep eth0 /proc/net/if_inet6 | cut -d' ' -f5 | sort; cat /etc/resolv.conf",
        sysctl={"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.conf.eth0.accept_local": "1"},
    )
    assert output.splitlines() == [
        *("eth0", "lo", "1400", "1", "0"),
        "192.0.2.9 dev eth0 lladdr 02:00:00:00:00:99",
        "2001:db8::9 dev eth0 lladdr 02:00:00:00:00:99",
        *("80", "82", "nameserver 192.0.2.1"),
    ]


def described(routes: list[types_pb2.Route]) -> set[tuple[object, ...]]:
    """Tell the routes apart from those that come with an address."""
    return {
        (route.dest, route.gateway, route.device, route.flags, route.mtu, route.metric, route.source)
        for route in routes
        if not route.dest.startswith(("192.0.2.0/", "2001:db8::/", "fe80::/"))
    }


def test_routes_replace_the_former_ones(network: Pod) -> None:
    route, hop = types_pb2.Route, extensions_pb2.NextHop
    v6 = types_pb2.v6
    # A gateway comes before what makes it reachable: the agent puts them in order.
    routes = network.update_routes(
        route(gateway="169.254.1.1", device="eth0", metric=7),
        route(dest="169.254.1.1/32", device="eth0", scope=LINK_SCOPE),
        route(dest="10.1.0.0/16", gateway="203.0.113.1", device="eth0", flags=ONLINK, mtu=1300),
        route(dest="10.2.0.0/16", gateway="fe80::1", device="eth0", source="192.0.2.2"),
        route(dest="2001:db8:1::/48", gateway="fe80::1", device="eth0", family=v6, metric=9),
        *(
            route(
                dest=dest,
                gateway=gateways[0],
                device="eth0",
                family=v6 if ":" in dest else types_pb2.v4,
                next_hops=[
                    hop(gateway=one, device="eth0", weight=w) for one, w in zip(gateways, (1, 3), strict=True)
                ],
            )
            for dest, gateways in (
                ("10.3.0.0/16", ("192.0.2.3", "192.0.2.4")),
                ("2001:db8:2::/48", ("fe80::3", "fe80::4")),
            )
        ),
    )
    assert described(routes) == {
        ("", "169.254.1.1", "eth0", 0, 0, 7, ""),
        ("169.254.1.1/32", "", "eth0", 0, 0, 0, ""),
        ("10.1.0.0/16", "203.0.113.1", "eth0", ONLINK, 1300, 0, ""),
        ("10.2.0.0/16", "fe80::1", "eth0", 0, 0, 0, "192.0.2.2"),
        ("10.3.0.0/16", "192.0.2.3", "eth0", 0, 0, 0, ""),
        ("2001:db8:1::/48", "fe80::1", "eth0", 0, 0, 9, ""),
        ("2001:db8:2::/48", "fe80::3", "eth0", 0, 0, 1024, ""),
    }
    shares = {r.dest: [(h.gateway, h.weight) for h in r.next_hops] for r in routes if r.next_hops}
    assert shares == {
        "10.3.0.0/16": [("192.0.2.3", 1), ("192.0.2.4", 3)],
        "2001:db8:2::/48": [("fe80::3", 1), ("fe80::4", 3)],
    }
    default = route(gateway="192.0.2.1", device="eth0")
    assert described(network.update_routes(default)) == {("", "192.0.2.1", "eth0", 0, 0, 0, "")}
    with pytest.raises(
        StatusError, match=r"route: 10\.9\.0\.0/16 via 203\.0\.113\.1: Network is unreachable"
    ):
        network.update_routes(default, route(dest="10.9.0.0/16", gateway="203.0.113.1", device="eth0"))
    listed = network.client.call("ListRoutes", agent_pb2.ListRoutesRequest()).Routes
    assert described(list(listed)) == {("", "192.0.2.1", "eth0", 0, 0, 0, "")}


def test_interfaces_change_names_addresses_and_flags(network: Pod) -> None:
    network.machine.plug_nic("tap1", mac=SECOND, port=PORTS[1])
    # Found by its hardware address alone.
    network.update("eth1", SECOND, "10.0.0.1/32", "10.0.0.2/32", "fe80::77/64")
    assert network.addresses("eth1") == {"10.0.0.1/32", "10.0.0.2/32", "fe80::77/64"}
    network.update("eth0", SECOND, "10.0.0.2/32", raw_flags=NOARP)
    assert network.addresses("eth0") == {"10.0.0.2/32"}
    shown = network.interfaces()
    assert (shown["eth0"].hwAddr, shown["eth1"].hwAddr) == (SECOND, FIRST)
    assert shown["eth0"].raw_flags & NOARP
    network.update("eth0", FIRST, "192.0.2.2/24", "2001:db8::2/64", mtu=1400)
    routes = described(network.update_routes(types_pb2.Route(gateway="192.0.2.1", device="eth0")))
    network.ping("192.0.2.2")
    network.ping("2001:db8::2")
    # Once more the same: nothing happens to the routes.
    network.update("eth0", FIRST, "192.0.2.2/24", "2001:db8::2/64", mtu=1400)
    listed = network.client.call("ListRoutes", agent_pb2.ListRoutesRequest()).Routes
    assert described(list(listed)) == routes


def test_an_impossible_request_is_refused_with_its_cause(network: Pod) -> None:
    for wanted, code, cause in (
        (interface("eth9", "02:00:00:00:00:09"), 13, "Link not found"),
        (interface("eth0", "02:00"), 3, "not a hardware address"),
        (interface("eth0", FIRST, "192.0.2.2/33"), 3, "not a prefix length"),
        (interface("eth0", FIRST, mtu=0), 13, "interface: eth0, MTU 0: Invalid argument"),
        (agent_pb2.UpdateInterfaceRequest(), 3, "the request has none"),
    ):
        with pytest.raises(StatusError, match=cause) as refused:
            network.client.call("UpdateInterface", wanted)
        assert refused.value.code == code

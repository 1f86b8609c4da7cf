"""The guest's network is planned from the kernel's messages about a namespace.

The messages have the form in which :mod:`shim.network.rtnetlink` decodes them.
"""

from __future__ import annotations

import struct
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest

from shim.errors import InvalidArgument
from shim.network.decode import decode
from shim.network.plan import Address, Endpoint, Neighbour, NetworkPlan, NextHop, Route
from shim.network.rtnetlink import attribute

UP, LOOPBACK, NOARP = 0x1, 0x8, 0x80
KERNEL, BOOT = 2, 3
V4, V6 = 2, 10
MAC = "02:00:00:00:00:02"
MTU_1300 = attribute(2, struct.pack("=I", 1300))
LOCK = attribute(1, struct.pack("=I", 1 << 2))
HOP_LIMIT = attribute(10, struct.pack("=I", 9))
LINK_LOCAL = "fe80::ff:fe00:2"


def attributes(**named: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in named.items() if value is not None]


def link(
    index: int,
    name: str,
    *,
    kind: str | None = "veth",
    flags: int = UP,
    ether: bool = True,
    mtu: int = 1400,
) -> dict[str, Any]:
    information = {"attrs": attributes(IFLA_INFO_KIND=kind)} if kind else None
    return {
        "index": index,
        "flags": flags,
        "ifi_type": 1 if ether else 65534,
        "attrs": attributes(IFLA_IFNAME=name, IFLA_ADDRESS=MAC, IFLA_MTU=mtu, IFLA_LINKINFO=information),
    }


LO = link(1, "lo", kind=None, flags=UP | LOOPBACK, mtu=65536)
ETH0 = link(2, "eth0")


def address(
    text: str,
    *,
    index: int = 2,
    peer: str | None = None,
    by_kernel: bool = False,
    flags: int = 0x80,
    scope: int = 0,
    **more: Any,
) -> dict[str, Any]:
    interface = ip_interface(text)
    own = str(interface.ip)
    return {
        "index": index,
        "prefixlen": interface.network.prefixlen,
        "flags": flags,
        "scope": scope,
        "attrs": attributes(
            IFA_ADDRESS=peer or own,
            IFA_LOCAL=own if interface.version == 4 or peer else None,
            IFA_PROTO=3 if by_kernel else None,
            **more,
        ),
    }


def route(destination: str, *, proto: int = BOOT, out: int | None = 2, **more: Any) -> dict[str, Any]:
    network = ip_network(destination)
    header = {"table": 254, "type": 1, "scope": 0, "flags": 0, "tos": 0, "src_len": 0}
    header |= {name: value for name, value in more.items() if name in header}
    return {
        "family": V4 if network.version == 4 else V6,
        "dst_len": network.prefixlen,
        "proto": proto,
        **header,
        "attrs": attributes(
            RTA_DST=str(network.network_address) if network.prefixlen else None,
            RTA_OIF=out,
            **{name: value for name, value in more.items() if name not in header},
        ),
    }


def way(gateway: str, *, index: int = 2, extra_weight: int = 0, flags: int = 0) -> dict[str, Any]:
    return {
        "oif": index,
        "hops": extra_weight,
        "flags": flags,
        "attrs": attributes(RTA_GATEWAY=gateway),
    }


def neighbour(
    ip: str, *, index: int = 2, state: int = 0x80, flags: int = 0, mac: str | None = MAC
) -> dict[str, Any]:
    return {
        "ifindex": index,
        "state": state,
        "flags": flags,
        "attrs": attributes(NDA_DST=ip, NDA_LLADDR=mac),
    }


def plan(*links: Any, addresses: Any = (), routes: Any = (), neighbours: Any = ()) -> NetworkPlan:
    return decode(links=links or [LO, ETH0], addresses=addresses, routes=routes, neighbours=neighbours)


def test_an_interface_becomes_a_card_with_the_same_name_address_and_mtu() -> None:
    [endpoint] = plan().endpoints

    assert endpoint == Endpoint(index=2, name="eth0", kind="veth", mac=MAC, mtu=1400, arp=True, addresses=())


def test_a_namespace_without_interfaces_is_an_empty_network() -> None:
    assert plan(LO) == NetworkPlan()


def test_cards_are_ordered_veth_macvlan_macvtap_tap() -> None:
    links = [
        link(2, "tap0", kind="tun"),
        link(3, "b", kind="macvtap"),
        link(4, "c", kind="macvlan"),
        link(6, "e"),
        link(5, "d"),
    ]

    assert [(endpoint.name, endpoint.kind) for endpoint in plan(*links).endpoints] == [
        ("d", "veth"),
        ("e", "veth"),
        ("c", "macvlan"),
        ("b", "macvtap"),
        ("tap0", "tap"),
    ]


def test_an_interface_that_is_down_is_ignored() -> None:
    assert plan(link(2, "tunl0", kind="ipip", flags=0), link(3, "eth0", flags=0)).endpoints == ()


def test_hakos_own_taps_are_ignored() -> None:
    assert plan(ETH0, link(3, "hako2", kind="tun")).endpoints == plan().endpoints


@pytest.mark.parametrize(
    ("kind", "ether", "named"),
    [
        ("ipvlan", True, "a ipvlan"),
        ("bridge", True, "a bridge"),
        ("tun", False, "a tun"),
        (None, True, "a physical device"),
    ],
)
def test_an_unsupported_interface_is_refused_by_name(kind: str | None, ether: bool, named: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^network: net1: {named} cannot .*; use veth, .* or tap$"):
        plan(ETH0, link(3, "net1", kind=kind, ether=ether))


def test_an_interface_without_neighbour_discovery_has_none_in_the_guest() -> None:
    [endpoint] = plan(link(2, "eth0", flags=UP | NOARP)).endpoints

    assert not endpoint.arp


def test_addresses_keep_their_prefix() -> None:
    texts = ["10.1.0.2/24", "10.1.0.3/24", "fd00::2/64", "192.0.2.1/32", "fd01::1/128"]
    routes = [
        route("10.1.0.0/24", proto=KERNEL),
        route("fd00::/64", proto=KERNEL),
        route("fd01::1/128", proto=KERNEL),
    ]

    found = plan(addresses=[address(text) for text in texts], routes=routes)

    assert {str(each) for each in found.endpoints[0].addresses} == {*texts}
    assert all(each.has_route for each in found.endpoints[0].addresses)
    assert found.routes == ()


def test_ipv6_addresses_are_sent_oldest_first() -> None:
    given = [address(text) for text in ("10.1.0.2/24", "10.1.0.3/24", "fd00::3/64", "fd00::2/64")]

    assert [str(each) for each in plan(addresses=given).endpoints[0].addresses] == [
        "10.1.0.2/24",
        "10.1.0.3/24",
        "fd00::2/64",
        "fd00::3/64",
    ]


def test_an_address_without_a_link_route_gets_none_in_the_guest() -> None:
    # The ptp plugin replaces it by a route through the gateway, because no other host is on that link.
    routes = [
        route("10.1.0.1/32", scope=253, RTA_PREFSRC="10.1.0.2"),
        route("10.1.0.0/24", RTA_GATEWAY="10.1.0.1", RTA_PREFSRC="10.1.0.2"),
    ]

    found = plan(addresses=[address("10.1.0.2/24"), address("fd00::2/64")], routes=routes)

    assert [(str(each), each.has_route) for each in found.endpoints[0].addresses] == [
        ("10.1.0.2/24", False),
        ("fd00::2/64", False),
    ]
    assert [str(each.destination) for each in found.routes] == ["10.1.0.1/32", "10.1.0.0/24"]


@pytest.mark.parametrize(
    ("own", "peer", "kernels"),
    [
        ("10.2.0.2/32", "10.2.0.1", ["10.2.0.1/32"]),
        ("10.2.0.2/32", "169.254.1.1", ["169.254.1.1/32"]),
        ("fd02::2/128", "fd02::1", ["fd02::1/128", "fd02::2/128"]),
    ],
)
def test_an_address_with_a_peer_has_a_route_to_the_peer(own: str, peer: str, kernels: list[str]) -> None:
    found = plan(
        addresses=[address(own, peer=peer)],
        routes=[route(destination, proto=KERNEL) for destination in kernels],
    )

    [taken] = found.endpoints[0].addresses
    assert (str(taken), taken.peer, taken.has_route) == (own, peer, True)
    assert [str(each.destination) for each in found.routes] == kernels[:1]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (address(f"{LINK_LOCAL}/64", by_kernel=True), []),
        (address("fe80::1/64"), ["fe80::1/64"]),
        (address("fd00::2/64", flags=0x88), []),
        (address("10.0.0.1/8", index=1), []),
    ],
    ids=["made by the kernel", "link-local by hand", "taken by another host", "of the loopback"],
)
def test_only_addresses_added_by_hand_go_to_the_guest(given: dict[str, Any], kept: list[str]) -> None:
    found = plan(
        addresses=[given], routes=[route("fe80::/64", proto=KERNEL), route("fd00::/64", proto=KERNEL)]
    )

    assert [str(each) for each in found.endpoints[0].addresses] == kept


def test_an_address_keeps_its_attributes() -> None:
    given = address(
        "10.1.0.2/24",
        flags=0x80 | 0x20 | 0x200,
        scope=253,
        IFA_LABEL="eth0:1",
        IFA_BROADCAST="10.1.0.255",
        IFA_RT_PRIORITY=7,
    )

    assert plan(addresses=[given]).endpoints[0].addresses == (
        Address(
            interface=ip_interface("10.1.0.2/24"),
            has_route=False,
            broadcast="10.1.0.255",
            label="eth0:1",
            scope=253,
            flags=0x200,
            metric=7,
            is_deprecated=True,
        ),
    )


def test_the_loopback_keeps_addresses_added_by_hand() -> None:
    given = [address(text, index=1) for text in ("127.0.0.1/8", "::1/128", "10.9.9.9/32", "fd09::9/128")]

    assert [str(each) for each in plan(addresses=given).loopback] == ["10.9.9.9/32", "fd09::9/128"]


@pytest.mark.parametrize(
    "ways",
    [
        {"RTA_ENCAP_TYPE": 1},
        {"out": None, "RTA_MULTIPATH": [way("10.1.0.1") | {"attrs": [("RTA_ENCAP_TYPE", 5)]}]},
        {"out": None, "RTA_NH_ID": 7},
    ],
    ids=["encapsulated", "one of its ways is encapsulated", "an object that is not explained"],
)
def test_an_unsupported_route_is_named_and_becomes_unreachable(ways: dict[str, Any]) -> None:
    found = plan(routes=[route("10.5.0.0/16", table=100, **ways)])

    assert found.routes == (Route(destination=ip_network("10.5.0.0/16"), type=7, table=100),)
    [line] = found.unserved
    assert line.startswith("route 10.5.0.0/16 table 100: ")
    assert line.endswith("the guest has an unreachable route instead")


def test_the_loopback_keeps_an_mtu_that_was_set() -> None:
    small = link(1, "lo", kind=None, flags=UP | LOOPBACK, mtu=1500)

    assert (plan(small).loopback_mtu, plan(LO).loopback_mtu) == (1500, 0)


def single(**parts: Any) -> Route:
    hop = {name: parts.pop(name) for name in ("gateway", "onlink") if name in parts}
    return Route(destination=ip_network(parts.pop("to")), hops=(NextHop(interface="eth0", **hop),), **parts)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (route("0.0.0.0/0", RTA_GATEWAY="10.1.0.1"), single(to="0.0.0.0/0", gateway="10.1.0.1")),
        (route("::/0", RTA_GATEWAY="fe80::1"), single(to="::/0", gateway="fe80::1")),
        (
            route("::/0", RTA_GATEWAY="fd00::1", RTA_PRIORITY=1024),
            single(to="::/0", gateway="fd00::1", metric=1024),
        ),
        (
            route("0.0.0.0/0", RTA_GATEWAY="169.254.1.1", flags=0x4),
            single(to="0.0.0.0/0", gateway="169.254.1.1", onlink=True),
        ),
        (
            # The same with flags for the link's carrier and for offload.
            route("0.0.0.0/0", RTA_GATEWAY="169.254.1.1", flags=0x4 | 0x10 | 0x8),
            single(to="0.0.0.0/0", gateway="169.254.1.1", onlink=True),
        ),
        (
            route("169.254.1.1/32", scope=253, RTA_PREFSRC="10.1.0.2"),
            single(to="169.254.1.1/32", scope=253, source="10.1.0.2"),
        ),
        (
            route("10.8.0.0/16", RTA_VIA={"family": V6, "addr": "fe80::1"}),
            single(to="10.8.0.0/16", gateway="fe80::1"),
        ),
        (
            route(
                "10.7.0.0/16",
                RTA_GATEWAY="10.1.0.1",
                RTA_PRIORITY=50,
                RTA_METRICS=MTU_1300,
            ),
            single(to="10.7.0.0/16", gateway="10.1.0.1", metric=50, mtu=1300),
        ),
        (
            # A locked MTU, and a hop limit.
            route("10.7.0.0/16", RTA_GATEWAY="10.1.0.1", RTA_METRICS=MTU_1300 + LOCK + HOP_LIMIT),
            single(
                to="10.7.0.0/16",
                gateway="10.1.0.1",
                mtu=1300,
                attributes=attribute(8, MTU_1300 + LOCK + HOP_LIMIT),
            ),
        ),
        (
            route("2001:db8::/32", proto=9, RTA_PREF=1, RTA_FLOW=bytes(4)),
            single(to="2001:db8::/32", protocol=9, attributes=attribute(20, b"\1") + attribute(11, bytes(4))),
        ),
        (route("10.5.0.0/16", type=6, out=None), Route(destination=ip_network("10.5.0.0/16"), type=6)),
        # IPv6 gives the loopback as the device of an unreachable route.
        (
            route("fd05::/64", type=7, out=1, RTA_PRIORITY=1024),
            Route(destination=ip_network("fd05::/64"), type=7, metric=1024),
        ),
        (
            route("10.5.0.0/16", RTA_TABLE=1000, table=252, RTA_GATEWAY="10.1.0.1"),
            single(to="10.5.0.0/16", gateway="10.1.0.1", table=1000),
        ),
        (
            route("0.0.0.0/0", RTA_TABLE=100, table=100, type=2, scope=254, out=1),
            Route(
                destination=ip_network("0.0.0.0/0"),
                hops=(NextHop(interface="lo"),),
                type=2,
                table=100,
                scope=254,
            ),
        ),
        (
            route("10.5.0.5/32", table=255, type=2, scope=254, out=1),
            Route(
                destination=ip_network("10.5.0.5/32"),
                hops=(NextHop(interface="lo"),),
                type=2,
                table=255,
                scope=254,
            ),
        ),
        (route("10.5.0.0/16", tos=16), single(to="10.5.0.0/16", tos=16)),
        (
            route("fd05::/64", src_len=8, RTA_SRC="fd00::"),
            single(to="fd05::/64", senders="fd00::/8"),
        ),
        (
            route(
                "fd01::/64",
                out=None,
                RTA_MULTIPATH=[way("fd00::1", extra_weight=2), way("fe80::5", flags=0x4)],
            ),
            Route(
                destination=ip_network("fd01::/64"),
                hops=(
                    NextHop(interface="eth0", gateway="fd00::1", weight=3),
                    NextHop(interface="eth0", gateway="fe80::5", onlink=True),
                ),
            ),
        ),
        (
            # The guest lacks the interface of one next hop.
            route("10.9.0.0/16", out=None, RTA_MULTIPATH=[way("10.1.0.1"), way("10.3.0.1", index=9)]),
            single(to="10.9.0.0/16", gateway="10.1.0.1"),
        ),
    ],
)
def test_a_route_is_copied_unchanged(message: dict[str, Any], expected: Route) -> None:
    assert plan(routes=[message]).routes == (expected,)


@pytest.mark.parametrize(
    "message",
    [
        route("10.1.0.2/32", proto=KERNEL, table=255, type=2),
        route("ff00::/8", proto=KERNEL, table=255, type=5),
        route("fe80::/64", proto=KERNEL, RTA_PRIORITY=256),
        route("::/0", proto=KERNEL, type=7, out=1, table=0),
        route("10.5.0.0/16", out=9),
        route("10.5.0.0/16", out=None, RTA_MULTIPATH=[way("10.3.0.1", index=7)]),
        route("fd00::5/128", flags=0x200),
        route("fd00::5/128", proto=1),
    ],
    ids=[
        "local table",
        "multicast",
        "link-local of the kernel",
        "nothing else is reachable",
        "through our own tap",
        "through what is not the guest's",
        "cached",
        "learned by redirect",
    ],
)
def test_a_route_that_the_guest_makes_itself_or_cannot_use_is_left_out(message: dict[str, Any]) -> None:
    assert plan(routes=[message]).routes == ()


def test_a_large_table_number_is_read_from_its_attribute() -> None:
    assert len(plan(routes=[route("10.5.0.0/16", table=252, RTA_TABLE=254)]).routes) == 1


def test_only_permanent_neighbours_are_copied() -> None:
    found = plan(
        neighbours=[
            neighbour("10.1.0.1"),
            neighbour("fd00::1"),
            neighbour("10.1.0.9", state=0x2),
            neighbour("ff02::16", state=0x40),
            neighbour("10.1.0.8", flags=0x8, state=0, mac=None),
            neighbour("10.1.0.7", mac=None),
            neighbour("10.1.0.6", index=9),
        ]
    )

    assert found.neighbours == (
        Neighbour(interface="eth0", ip="10.1.0.1", mac=MAC),
        Neighbour(interface="eth0", ip="fd00::1", mac=MAC),
        Neighbour(interface="eth0", ip="10.1.0.8"),
    )

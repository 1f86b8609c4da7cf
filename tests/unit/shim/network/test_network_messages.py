"""A network is described to the guest agent in messages."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network
from typing import Any

import pytest
from google.protobuf import json_format

from shim.network import messages
from shim.network.plan import Address, Endpoint, Neighbour, NetworkPlan, NextHop, Route
from shim.network.rules import USUAL

MAC = "02:00:00:00:00:02"
GATEWAY = NextHop(interface="eth0", gateway="10.1.0.1")


def route(to: str, *hops: NextHop, metric: int = 0) -> Route:
    return Route(destination=ip_network(to), hops=hops or (NextHop(interface="eth0"),), metric=metric)


def test_a_card_is_described_with_all_addresses_and_its_pci_path() -> None:
    endpoint = Endpoint(
        index=2,
        name="eth0",
        kind="veth",
        mac=MAC,
        mtu=1400,
        arp=True,
        addresses=(
            Address(interface=ip_interface("10.1.0.2/24"), broadcast="10.1.0.255", label="eth0"),
            Address(interface=ip_interface("fd00::2/64")),
        ),
    )

    assert json_format.MessageToDict(messages.interface(endpoint, pci_path="02/1e")) == {
        "device": "eth0",
        "name": "eth0",
        "IPAddresses": [
            {"address": "10.1.0.2", "mask": "24"},
            {"family": "v6", "address": "fd00::2", "mask": "64"},
        ],
        "mtu": "1400",
        "hwAddr": MAC,
        "devicePath": "02/1e",
        "type": "veth",
    }


@pytest.mark.parametrize(
    ("more", "mask", "details"),
    [
        ({"broadcast": ""}, "24", {"prefix": 24}),
        ({"has_route": False}, "32", {"prefix": 24, "broadcast": "10.1.0.255", "flags": 0x200}),
        ({"peer": "10.1.0.9"}, "32", {"prefix": 24, "broadcast": "10.1.0.255", "peer": "10.1.0.9"}),
        ({"label": "eth0:1"}, "24", {"prefix": 24, "broadcast": "10.1.0.255", "label": "eth0:1"}),
        ({"scope": 253}, "24", {"prefix": 24, "broadcast": "10.1.0.255", "scope": 253}),
        ({"metric": 7}, "24", {"prefix": 24, "broadcast": "10.1.0.255", "metric": 7}),
        ({"is_deprecated": True}, "24", {"prefix": 24, "broadcast": "10.1.0.255", "deprecated": True}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_unusual_address_is_marked_for_stock_agents(
    more: dict[str, Any], mask: str, details: dict[str, Any]
) -> None:
    address = Address(interface=ip_interface("10.1.0.2/24"), **({"broadcast": "10.1.0.255"} | more))

    [told] = messages.loopback([address], mtu=0).IPAddresses

    assert (told.mask, json_format.MessageToDict(told.details)) == (mask, details)


def test_a_card_without_neighbour_discovery_is_marked() -> None:
    endpoint = Endpoint(index=2, name="eth0", kind="veth", mac=MAC, mtu=1400, arp=False, addresses=())

    assert messages.interface(endpoint, pci_path="").raw_flags == 0x80


def test_routes_follow_those_to_their_gateway_and_the_preferred_comes_last() -> None:
    planned = [
        route("0.0.0.0/0", GATEWAY, metric=50),
        route("0.0.0.0/0", GATEWAY, metric=100),
        route("10.1.0.1/32"),
    ]

    assert [(each.dest, each.metric) for each in messages.routes(planned).Routes] == [
        ("10.1.0.1/32", 0),
        ("", 100),
        ("", 50),
    ]


def test_a_route_is_described_completely() -> None:
    planned = Route(
        destination=ip_network("10.7.0.0/16"),
        hops=(NextHop(interface="eth0", gateway="169.254.1.1", onlink=True),),
        source="10.1.0.2",
        scope=253,
        metric=50,
        mtu=1300,
    )

    assert [json_format.MessageToDict(each) for each in messages.routes([planned]).Routes] == [
        {
            "dest": "10.7.0.0/16",
            "gateway": "169.254.1.1",
            "device": "eth0",
            "source": "10.1.0.2",
            "scope": 253,
            "flags": 4,
            "mtu": 1300,
            "metric": 50,
        }
    ]


def test_a_stock_agent_gets_the_first_of_several_next_hops() -> None:
    ways = (
        NextHop(interface="eth0", gateway="fd00::1", weight=3),
        NextHop(interface="net1", gateway="fe80::5"),
    )

    [message] = messages.routes([route("fd01::/64", *ways)]).Routes

    assert json_format.MessageToDict(message) == {
        "dest": "fd01::/64",
        "gateway": "fd00::1",
        "device": "eth0",
        "family": "v6",
        "nextHops": [
            {"gateway": "fd00::1", "device": "eth0", "weight": 3},
            {"gateway": "fe80::5", "device": "net1", "weight": 1},
        ],
    }


def test_an_unusual_route_is_marked() -> None:
    planned = Route(
        destination=ip_network("2001:db8::/32"),
        type=6,
        table=1000,
        tos=8,
        protocol=4,
        senders="fd00::/8",
        attributes=b"\5\0\x14\0\1\0\0\0",
    )

    assert [json_format.MessageToDict(each) for each in messages.routes([planned]).Routes] == [
        {
            "dest": "2001:db8::/32",
            "family": "v6",
            "type": 6,
            "table": 1000,
            "tos": 8,
            "protocol": 4,
            "senders": "fd00::/8",
            "attributes": "BQAUAAEAAAA=",
        }
    ]


def test_the_usual_rules_are_sent_after_other_rules_are_removed() -> None:
    assert [each.text for each in messages.rules(None).rules] == [rule.text for rule in USUAL]
    assert len(USUAL) == 5


def test_what_katas_protocol_cannot_express_is_named_for_a_stock_agent() -> None:
    blackhole = Route(destination=ip_network("10.5.0.0/16"), type=6)
    other_table = Route(destination=ip_network("10.6.0.0/16"), hops=(GATEWAY,), table=100)
    local = Route(destination=ip_network("10.7.0.0/16"), hops=(NextHop(interface="lo"),), type=2)
    gone = Route(destination=ip_network("10.8.0.0/16"), hops=(GATEWAY,))
    plan = NetworkPlan(
        routes=(blackhole, other_table, local, route("10.9.0.0/16", GATEWAY)),
        rules=USUAL[:1],
        settings=(("net/core/somaxconn", "7"),),
        unserved=("a packet filter",),
    )

    changed = messages.for_stock_agent(plan, former=NetworkPlan(routes=(gone,)))

    assert [(each.dest, each.device, each.type) for each in messages.routes(changed.routes).Routes] == [
        ("10.5.0.0/16", "lo", 0),
        ("10.9.0.0/16", "eth0", 0),
    ]
    assert (changed.rules, changed.settings) == (None, ())
    assert [line.partition(": ")[0] for line in changed.unserved] == [
        "a packet filter",
        "route 10.6.0.0/16 table 100",
        "route local 10.7.0.0/16",
        "rule 0",
        "net/core/somaxconn = 7",
        "route 10.8.0.0/16",
    ]


def test_a_fixed_neighbour_stays_fixed() -> None:
    planned = [
        Neighbour(interface="eth0", ip="10.1.0.8"),
        Neighbour(interface="eth0", ip="10.1.0.1", mac=MAC),
        Neighbour(interface="eth0", ip="fd00::1", mac=MAC),
    ]

    assert json_format.MessageToDict(messages.neighbours(planned)) == {
        "ARPNeighbors": [
            {"toIPAddress": {"address": "10.1.0.8"}, "device": "eth0", "state": 128, "flags": 8},
            {"toIPAddress": {"address": "10.1.0.1"}, "device": "eth0", "lladdr": MAC, "state": 128},
            {
                "toIPAddress": {"family": "v6", "address": "fd00::1"},
                "device": "eth0",
                "lladdr": MAC,
                "state": 128,
            },
        ]
    }

"""The words in which the guest agent is told of a network."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network

from google.protobuf import json_format

from shim.network import messages
from shim.network.plan import Endpoint, Neighbour, NextHop, Route

MAC = "02:00:00:00:00:02"
GATEWAY = NextHop(interface="eth0", gateway="10.1.0.1")


def route(to: str, *hops: NextHop, metric: int = 0) -> Route:
    return Route(destination=ip_network(to), hops=hops or (NextHop(interface="eth0"),), metric=metric)


def test_a_card_is_described_with_all_its_addresses_and_its_place():
    endpoint = Endpoint(
        index=2,
        name="eth0",
        kind="veth",
        mac=MAC,
        mtu=1400,
        arp=True,
        addresses=(ip_interface("10.1.0.2/24"), ip_interface("fd00::2/64")),
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


def test_a_card_without_neighbour_discovery_says_so():
    endpoint = Endpoint(index=2, name="eth0", kind="veth", mac=MAC, mtu=1400, arp=False, addresses=())

    assert messages.interface(endpoint, pci_path="").raw_flags == 0x80


def test_gateways_follow_the_routes_they_are_reached_by_and_the_preferred_route_comes_last():
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


def test_a_route_says_everything_that_is_known_of_it():
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


def test_of_several_ways_an_agent_that_knows_one_takes_the_first():
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


def test_a_fixed_neighbour_stays_fixed():
    planned = [
        Neighbour(interface="eth0", ip="10.1.0.1", mac=MAC),
        Neighbour(interface="eth0", ip="fd00::1", mac=MAC),
    ]

    assert json_format.MessageToDict(messages.neighbours(planned)) == {
        "ARPNeighbors": [
            {"toIPAddress": {"address": "10.1.0.1"}, "device": "eth0", "lladdr": MAC, "state": 128},
            {
                "toIPAddress": {"family": "v6", "address": "fd00::1"},
                "device": "eth0",
                "lladdr": MAC,
                "state": 128,
            },
        ]
    }

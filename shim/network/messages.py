"""Plan to the guest agent's messages: Kata's protocol, with fields of our own for what it has no word for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.kata import agent_pb2, types_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.network.plan import Endpoint, Neighbour, NextHop, Route

_IFF_NOARP = 0x80
_RTNH_F_ONLINK = 0x4
_NUD_PERMANENT = 0x80
_FAMILIES = {4: types_pb2.IPFamily.v4, 6: types_pb2.IPFamily.v6}


def interface(endpoint: Endpoint, *, pci_path: str) -> types_pb2.Interface:
    """Describe the card that stands for an endpoint.

    :param pci_path: where the guest finds the card.
    """
    return types_pb2.Interface(
        device=endpoint.name,
        name=endpoint.name,
        IPAddresses=[
            types_pb2.IPAddress(
                family=_FAMILIES[address.version],
                address=str(address.ip),
                mask=str(address.network.prefixlen),
            )
            for address in endpoint.addresses
        ],
        mtu=endpoint.mtu,
        hwAddr=endpoint.mac,
        devicePath=pci_path,
        type=endpoint.kind,
        raw_flags=0 if endpoint.arp else _IFF_NOARP,
    )


def routes(planned: Iterable[Route]) -> agent_pb2.Routes:
    """Put routes into the order in which an agent can add them one by one.

    A gateway is reachable once the routes without one are there. An agent that does not know metrics keeps
    the last of the routes to a destination: that is the one with the lowest.
    """
    ordered = sorted(planned, key=lambda route: (any(hop.gateway for hop in route.hops), -route.metric))
    return agent_pb2.Routes(Routes=[_route(route) for route in ordered])


def neighbours(planned: Iterable[Neighbour]) -> agent_pb2.ARPNeighbors:
    """Describe fixed neighbours."""
    return agent_pb2.ARPNeighbors(
        ARPNeighbors=[
            types_pb2.ARPNeighbor(
                toIPAddress=types_pb2.IPAddress(
                    family=types_pb2.IPFamily.v6 if ":" in neighbour.ip else types_pb2.IPFamily.v4,
                    address=neighbour.ip,
                ),
                device=neighbour.interface,
                lladdr=neighbour.mac,
                state=_NUD_PERMANENT,
            )
            for neighbour in planned
        ]
    )


def _route(route: Route) -> types_pb2.Route:
    first = route.hops[0]
    return types_pb2.Route(
        dest=str(route.destination) if route.destination.prefixlen else "",
        gateway=first.gateway,
        device=first.interface,
        source=route.source,
        scope=route.scope,
        family=_FAMILIES[route.destination.version],
        flags=_flags(first),
        mtu=route.mtu,
        metric=route.metric,
        next_hops=[
            types_pb2.NextHop(gateway=hop.gateway, device=hop.interface, weight=hop.weight, flags=_flags(hop))
            for hop in route.hops
        ]
        if len(route.hops) > 1
        else [],
    )


def _flags(hop: NextHop) -> int:
    return _RTNH_F_ONLINK if hop.onlink else 0

"""Converts the plan to messages for the guest's agent: Kata's, with Hako's fields for missing attributes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from proto import extensions_pb2
from proto.kata import agent_pb2, types_pb2
from shim.network.plan import NOWHERE, NextHop
from shim.network.rules import USUAL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.network.plan import Address, Endpoint, Neighbour, NetworkPlan, Route, Rule

LOOPBACK = "lo"

_IFF_NOARP = 0x80
_IFA_F_NOPREFIXROUTE = 0x200
_RTNH_F_ONLINK = 0x4
_RTN_UNICAST, _RT_TABLE_MAIN, _RTPROT_BOOT = 1, 254, 3
_NUD_PERMANENT = 0x80
_NTF_PROXY = 0x8
_LOOPBACK_MTU = 65536
_LOOPBACK_MAC = "00:00:00:00:00:00"
_FAMILIES = {4: types_pb2.IPFamily.v4, 6: types_pb2.IPFamily.v6}


def interface(endpoint: Endpoint, *, pci_path: str) -> types_pb2.Interface:
    """Describe an endpoint's card.

    :param pci_path: the card's PCI path in the guest.
    """
    return types_pb2.Interface(
        device=endpoint.name,
        name=endpoint.name,
        IPAddresses=[_address(address, interface=endpoint.name) for address in endpoint.addresses],
        mtu=endpoint.mtu,
        hwAddr=endpoint.mac,
        devicePath=pci_path,
        type=endpoint.kind,
        raw_flags=endpoint.flags | (0 if endpoint.arp else _IFF_NOARP),
    )


def loopback(addresses: Iterable[Address], *, mtu: int) -> types_pb2.Interface:
    """Describe the loopback with its addresses; a stock agent can find it by its hardware address.

    :param mtu: in bytes; 0 for the kernel's default.
    """
    return types_pb2.Interface(
        device=LOOPBACK,
        name=LOOPBACK,
        IPAddresses=[_address(address, interface=LOOPBACK) for address in addresses],
        mtu=mtu or _LOOPBACK_MTU,
        hwAddr=_LOOPBACK_MAC,
        type="loopback",
    )


def routes(planned: Iterable[Route]) -> agent_pb2.Routes:
    """Sort routes so that an agent can add them one by one.

    A gateway is reachable only once the routes without a gateway exist. An agent that does not know metrics
    keeps the last of the routes to a destination, so the one with the lowest metric comes last.
    """
    ordered = sorted(planned, key=lambda route: (any(hop.gateway for hop in route.hops), -route.metric))
    return agent_pb2.Routes(Routes=[_route(route) for route in ordered])


def rules(planned: Iterable[Rule] | None) -> extensions_pb2.Rules:
    """Describe all rules of the guest; None stands for the rules of a new namespace."""
    chosen = USUAL if planned is None else planned
    return extensions_pb2.Rules(
        rules=[extensions_pb2.Rule(body=rule.body, text=rule.text) for rule in chosen]
    )


def settings(planned: Iterable[tuple[str, str]]) -> extensions_pb2.Settings:
    """Describe all kernel parameters of the guest."""
    return extensions_pb2.Settings(values=dict(planned))


def neighbours(planned: Iterable[Neighbour]) -> agent_pb2.ARPNeighbors:
    """Describe permanent neighbours and proxy entries."""
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
                flags=0 if neighbour.mac else _NTF_PROXY,
            )
            for neighbour in planned
        ]
    )


def for_stock_agent(plan: NetworkPlan, *, former: NetworkPlan) -> NetworkPlan:
    """Remove the parts of a plan that Kata's protocol cannot express, and list them in it.

    :param former: the plan that the agent got before.
    """
    routes: list[Route] = []
    unserved = list(plan.unserved)
    for route in plan.routes:
        if route.table != _RT_TABLE_MAIN or route.tos or route.senders:
            unserved.append(f"{route}: this guest's agent knows the main table only")
        elif route.type in NOWHERE:
            # The loopback drops packets that are not for its own addresses.
            hops = (NextHop(interface=LOOPBACK),)
            routes.append(replace(route, type=_RTN_UNICAST, hops=hops))
        elif route.type != _RTN_UNICAST:
            unserved.append(f"{route}: this guest's agent knows no such routes")
        else:
            routes.append(route)
    unserved += [f"{rule.text}: this guest's agent knows no rules" for rule in plan.rules or ()]
    unserved += [f"{name} = {value}: this guest's agent sets no parameters" for name, value in plan.settings]
    unserved += [
        f"{gone}: it is gone, and this guest's agent keeps it"
        for gone in former.routes
        if gone not in plan.routes
    ]
    return replace(plan, routes=tuple(routes), rules=None, settings=(), unserved=tuple(unserved))


def _address(address: Address, *, interface: str) -> types_pb2.IPAddress:
    network = address.interface.network
    # If an agent gets only the mask, its kernel makes a route from it.
    mask = network.prefixlen if address.has_route and not address.peer else network.max_prefixlen
    whole = types_pb2.IPAddress(
        family=_FAMILIES[network.version], address=str(address.interface.ip), mask=str(mask)
    )
    flags = address.flags | (0 if address.has_route else _IFA_F_NOPREFIXROUTE)
    label = "" if address.label == interface else address.label
    own_broadcast = str(network.broadcast_address) if network.version == 4 and mask < 31 else ""
    is_plain = not (
        flags or label or address.peer or address.scope or address.metric or address.is_deprecated
    )
    if not is_plain or address.broadcast != own_broadcast:
        whole.details.CopyFrom(
            extensions_pb2.AddressDetails(
                prefix=network.prefixlen,
                peer=address.peer,
                broadcast=address.broadcast,
                label=label,
                scope=address.scope,
                flags=flags,
                metric=address.metric,
                deprecated=address.is_deprecated,
            )
        )
    return whole


def _route(route: Route) -> types_pb2.Route:
    first = route.hops[0] if route.hops else NextHop(interface="")
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
            extensions_pb2.NextHop(
                gateway=hop.gateway, device=hop.interface, weight=hop.weight, flags=_flags(hop)
            )
            for hop in route.hops
        ]
        if len(route.hops) > 1
        else [],
        type=route.type if route.type != _RTN_UNICAST else 0,
        table=route.table if route.table != _RT_TABLE_MAIN else 0,
        tos=route.tos,
        protocol=route.protocol if route.protocol != _RTPROT_BOOT else 0,
        senders=route.senders,
        attributes=route.attributes,
    )


def _flags(hop: NextHop) -> int:
    return _RTNH_F_ONLINK if hop.onlink else 0

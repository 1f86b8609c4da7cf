"""Netlink messages to plan: which interfaces are taken, and what of their configuration is somebody's will.

Pure: the messages are mappings as pyroute2 decodes them. What the kernel made by itself is left out, for the
guest's kernel makes it as well; what it would make though the pod's namespace does not have it is prevented.
The numbers are those of rtnetlink(7) and linux/rtnetlink.h.
"""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any

from shim.errors import InvalidArgument
from shim.network.plan import Endpoint, Neighbour, NetworkPlan, NextHop, Route

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Network, IPv6Network

    Message = Mapping[str, Any]

TAP_PREFIX = "hako"
"""How the names of the taps begin that connect an interface to a machine."""

KINDS = ("veth", "macvlan", "macvtap", "tap")
"""The interfaces that can be connected to a machine, in the order in which the guest gets them."""

_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_IFF_NOARP = 0x80
_ARPHRD_ETHER = 1
_IFA_F_DADFAILED = 0x8
_IFAPROT_KERNEL_LL = 3
_AF_INET = 2
_RT_TABLE_MAIN = 254
_RTN_UNICAST = 1
_RTPROT_REDIRECT = 1
_RTPROT_KERNEL = 2
_RTM_F_CLONED = 0x200
_RTNH_F_ONLINK = 0x4
_NUD_PERMANENT = 0x80
_NTF_PROXY = 0x8


def decode(
    *,
    links: Iterable[Message],
    addresses: Iterable[Message],
    routes: Iterable[Message],
    neighbours: Iterable[Message],
) -> NetworkPlan:
    """Decide what the guest gets of a namespace.

    :raises InvalidArgument: if an interface is up that cannot be connected to a machine.
    """
    wanted = [link for link in links if _is_wanted(link)]
    names = {link["index"]: _attribute(link, "IFLA_IFNAME") for link in wanted}
    main = [route for route in routes if _is_in_main_table(route)]
    prefixes = {
        (_attribute(route, "RTA_OIF"), _destination(route))
        for route in main
        if route["proto"] == _RTPROT_KERNEL
    }
    addresses = [*addresses]
    endpoints = [_endpoint(link, addresses=addresses, prefixes=prefixes) for link in wanted]
    endpoints.sort(key=lambda endpoint: (KINDS.index(endpoint.kind), endpoint.index))
    remade = {
        (endpoint.index, address.network) for endpoint in endpoints for address in endpoint.addresses
    } | {
        # The guest's kernel makes these for each address of its own.
        (message["index"], ip_network(_own_address(message)))
        for message in addresses
    }
    return NetworkPlan(
        endpoints=tuple(endpoints),
        routes=tuple(
            decoded
            for route in main
            if not _is_remade(route, remade) and (decoded := _route(route, names=names)) is not None
        ),
        neighbours=tuple(
            Neighbour(
                interface=names[message["ifindex"]],
                ip=_attribute(message, "NDA_DST"),
                mac=_attribute(message, "NDA_LLADDR"),
            )
            for message in neighbours
            if message["ifindex"] in names and _is_fixed(message)
        ),
    )


def _attribute(message: Message, name: str) -> Any:
    return next((value for key, value in message["attrs"] if key == name), None)


def _kind(link: Message) -> str:
    information = _attribute(link, "IFLA_LINKINFO")
    kind = information and _attribute(information, "IFLA_INFO_KIND")
    if kind == "tun":  # the kernel has one name for both
        return "tap" if link["ifi_type"] == _ARPHRD_ETHER else "tun"
    return kind or "physical device"


def _is_wanted(link: Message) -> bool:
    if not link["flags"] & _IFF_UP or link["flags"] & _IFF_LOOPBACK:
        return False
    kind, name = _kind(link), _attribute(link, "IFLA_IFNAME")
    if kind == "tap" and name.startswith(TAP_PREFIX):
        return False
    if kind not in KINDS:
        raise InvalidArgument(
            f"network: {name}: a {kind} cannot be connected to a machine; use {', '.join(KINDS[:-1])} or "
            f"{KINDS[-1]}"
        )
    return True


def _endpoint(
    link: Message,
    *,
    addresses: Iterable[Message],
    prefixes: set[tuple[int, IPv4Network | IPv6Network]],
) -> Endpoint:
    index = link["index"]
    return Endpoint(
        index=index,
        name=_attribute(link, "IFLA_IFNAME"),
        kind=_kind(link),
        mac=_attribute(link, "IFLA_ADDRESS"),
        mtu=_attribute(link, "IFLA_MTU"),
        arp=not link["flags"] & _IFF_NOARP,
        addresses=tuple(
            _address(message, prefixes=prefixes)
            for message in addresses
            if message["index"] == index and not _is_made_by_kernel(message)
        ),
    )


def _own_address(message: Message) -> str:
    # Without a peer, IPv6 has IFA_ADDRESS only; with one, IFA_ADDRESS is the peer's.
    return str(_attribute(message, "IFA_LOCAL") or _attribute(message, "IFA_ADDRESS"))


def _is_made_by_kernel(message: Message) -> bool:
    if _attribute(message, "IFA_PROTO") == _IFAPROT_KERNEL_LL:
        return True
    return bool(message["flags"] & _IFA_F_DADFAILED)


def _address(
    message: Message, *, prefixes: set[tuple[int, IPv4Network | IPv6Network]]
) -> IPv4Interface | IPv6Interface:
    own = _own_address(message)
    address = ip_interface(f"{own}/{message['prefixlen']}")
    has_peer = _attribute(message, "IFA_ADDRESS") != own
    if has_peer or (message["index"], address.network) not in prefixes:
        # Given its prefix, the guest's kernel would take all of it for reachable on the link.
        return ip_interface(own)
    return address


def _is_in_main_table(route: Message) -> bool:
    return (
        (_attribute(route, "RTA_TABLE") or route["table"]) == _RT_TABLE_MAIN
        and route["type"] == _RTN_UNICAST
        and route["proto"] != _RTPROT_REDIRECT
        and not route["flags"] & _RTM_F_CLONED
    )


def _destination(route: Message) -> IPv4Network | IPv6Network:
    unspecified = "0.0.0.0" if route["family"] == _AF_INET else "::"  # noqa: S104 - not bound to
    return ip_network(f"{_attribute(route, 'RTA_DST') or unspecified}/{route['dst_len']}")


def _is_remade(route: Message, remade: set[tuple[int, IPv4Network | IPv6Network]]) -> bool:
    destination = _destination(route)
    return route["proto"] == _RTPROT_KERNEL and (
        (destination.version == 6 and destination.is_link_local)
        or (_attribute(route, "RTA_OIF"), destination) in remade
    )


def _route(route: Message, *, names: Mapping[int, str]) -> Route | None:
    ways = _attribute(route, "RTA_MULTIPATH") or [
        # One way is written in the message itself, with the very attributes that each of several has.
        {"oif": _attribute(route, "RTA_OIF"), "hops": 0, "flags": route["flags"], "attrs": route["attrs"]}
    ]
    hops = tuple(
        NextHop(
            interface=names[way["oif"]],
            gateway=_gateway(way),
            onlink=bool(way["flags"] & _RTNH_F_ONLINK),
            weight=way["hops"] + 1,
        )
        for way in ways
        if way["oif"] in names
    )
    if not hops:
        return None
    metrics = _attribute(route, "RTA_METRICS")
    return Route(
        destination=_destination(route),
        hops=hops,
        source=_attribute(route, "RTA_PREFSRC") or "",
        scope=route["scope"],
        metric=_attribute(route, "RTA_PRIORITY") or 0,
        mtu=(metrics and _attribute(metrics, "RTAX_MTU")) or 0,
    )


def _gateway(way: Message) -> str:
    via = _attribute(way, "RTA_VIA")
    gateway = via["addr"] if via else _attribute(way, "RTA_GATEWAY")
    return str(ip_address(gateway)) if gateway else ""


def _is_fixed(neighbour: Message) -> bool:
    return bool(
        neighbour["state"] & _NUD_PERMANENT
        and not neighbour["flags"] & _NTF_PROXY
        and _attribute(neighbour, "NDA_LLADDR")
    )

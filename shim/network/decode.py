"""Netlink messages to plan: chooses the interfaces, and the configuration that was set on purpose.

Pure: the messages are mappings as :mod:`shim.network.rtnetlink` decodes them. Entries that the kernel made
are left out, because the guest's kernel makes them, too. If the pod's namespace lacks one of them, the
guest's kernel is prevented from making it. The numbers are those of rtnetlink(7) and linux/rtnetlink.h.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any

from shim.errors import InvalidArgument
from shim.network.plan import NOWHERE, Address, Endpoint, Neighbour, NetworkPlan, NextHop, Route
from shim.network.rtnetlink import NTF_PROXY, attribute, attributes
from shim.network.rules import decode_rules

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Network, IPv6Network

    Message = Mapping[str, Any]
    Network = IPv4Network | IPv6Network

TAP_PREFIX = "hako"
"""The prefix of the names of taps that connect an interface to a machine."""

KINDS = ("veth", "macvlan", "macvtap", "tap")
"""The interfaces that can be connected to a machine, in the order in which the guest gets them."""

_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_IFF_NOARP = 0x80
_IFF_PROMISC = 0x100
_IFF_ALLMULTI = 0x200
_ARPHRD_ETHER = 1
_LOOPBACK_MTU = 65536
_IFA_F_DADFAILED = 0x8
_IFA_F_DEPRECATED = 0x20
_CHOSEN_FLAGS = 0x10 | 0x200 | 0x400  # IFA_F_HOMEADDRESS, IFA_F_NOPREFIXROUTE, IFA_F_MCAUTOJOIN
_IFA_F_NOPREFIXROUTE = 0x200
_IFAPROT_KERNEL_LL = 3
_AF_INET = 2
_RT_TABLE_MAIN, _RT_TABLE_LOCAL = 254, 255
_RTN_UNICAST, _RTN_LOCAL, _RTN_UNREACHABLE = 1, 2, 7
_RTPROT_REDIRECT = 1
_RTPROT_KERNEL = 2
_RTM_F_CLONED = 0x200
_RTNH_F_ONLINK = 0x4
_RTA_METRICS, _RTA_FLOW, _RTA_PREF = 8, 11, 20
_RTAX_MTU = 2
_NUD_PERMANENT = 0x80


def decode(
    *,
    links: Iterable[Message],
    addresses: Iterable[Message],
    routes: Iterable[Message],
    neighbours: Iterable[Message],
    rules: Iterable[bytes] = (),
) -> NetworkPlan:
    """Choose the parts of a namespace that the guest gets.

    :param rules: bodies of the kernel's messages; an empty list stands for the usual rules.
    :raises InvalidArgument: if an interface is up that cannot be connected to a machine.
    """
    links, addresses, routes, rules = [*links], [*addresses], [*routes], [*rules]
    wanted = [link for link in links if _is_wanted(link)]
    loopback = next((link for link in links if link["flags"] & _IFF_LOOPBACK), None)
    present = [link for link in (*wanted, loopback) if link is not None]
    names = {link["index"]: _attribute(link, "IFLA_IFNAME") for link in present}
    made = {(_attribute(route, "RTA_OIF"), _destination(route)) for route in routes if _is_of_kernel(route)}
    endpoints = [_endpoint(link, addresses=addresses, made=made) for link in wanted]
    endpoints.sort(key=lambda endpoint: (KINDS.index(endpoint.kind), endpoint.index))
    remade = {
        (endpoint.index, address.interface.network)
        for endpoint in endpoints
        for address in endpoint.addresses
        if address.has_route and not address.peer
    } | {
        # The guest's kernel makes these for each of its addresses.
        (message["index"], ip_network(_own_address(message)))
        for message in addresses
    }
    unserved: list[str] = []
    taken = [
        decoded
        for route in routes
        if _is_wanted_route(route)
        and not _is_remade(route, remade)
        and (decoded := _route(route, names=names, unserved=unserved)) is not None
    ]
    chosen, refused = decode_rules(rules) if rules else (None, ())
    mtu = _attribute(loopback, "IFLA_MTU") if loopback is not None else _LOOPBACK_MTU
    return NetworkPlan(
        endpoints=tuple(endpoints),
        loopback=_loopback_addresses(loopback, addresses=addresses, made=made),
        loopback_mtu=mtu if mtu != _LOOPBACK_MTU else 0,
        routes=tuple(taken),
        rules=chosen,
        neighbours=tuple(
            Neighbour(
                interface=names[message["ifindex"]],
                ip=_attribute(message, "NDA_DST"),
                mac="" if message["flags"] & NTF_PROXY else _attribute(message, "NDA_LLADDR"),
            )
            for message in neighbours
            if message["ifindex"] in names and _is_fixed(message)
        ),
        unserved=(*unserved, *refused),
    )


def _attribute(message: Message, name: str) -> Any:
    return next((value for key, value in message["attrs"] if key == name), None)


def _kind(link: Message) -> str:
    information = _attribute(link, "IFLA_LINKINFO")
    kind = information and _attribute(information, "IFLA_INFO_KIND")
    if kind == "tun":  # the kernel uses one name for both
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


def _endpoint(link: Message, *, addresses: Iterable[Message], made: set[tuple[int, Network]]) -> Endpoint:
    index = link["index"]
    name = _attribute(link, "IFLA_IFNAME")
    return Endpoint(
        index=index,
        name=name,
        kind=_kind(link),
        mac=_attribute(link, "IFLA_ADDRESS"),
        mtu=_attribute(link, "IFLA_MTU"),
        arp=not link["flags"] & _IFF_NOARP,
        addresses=_in_order(
            _address(message, made=made)
            for message in addresses
            if message["index"] == index and not _is_made_by_kernel(message)
        ),
        flags=link["flags"] & (_IFF_PROMISC | _IFF_ALLMULTI),
    )


def _loopback_addresses(
    link: Message | None, *, addresses: Iterable[Message], made: set[tuple[int, Network]]
) -> tuple[Address, ...]:
    if link is None:
        return ()
    return _in_order(
        _address(message, made=made)
        for message in addresses
        if message["index"] == link["index"] and (_own_address(message), message["prefixlen"]) not in _ALWAYS
    )


def _in_order(addresses: Iterable[Address]) -> tuple[Address, ...]:
    """Sort addresses by the time when they were added: the kernel lists the latest IPv6 address first."""
    listed = [*addresses]
    return (
        *(each for each in listed if each.interface.version == 4),
        *(each for each in reversed(listed) if each.interface.version == 6),
    )


_ALWAYS = {("127.0.0.1", 8), ("::1", 128)}
"""The addresses that the kernel gives the loopback."""


def _own_address(message: Message) -> str:
    # Without a peer, IPv6 has only IFA_ADDRESS; with one, IFA_ADDRESS is the peer's.
    return str(_attribute(message, "IFA_LOCAL") or _attribute(message, "IFA_ADDRESS"))


def _is_made_by_kernel(message: Message) -> bool:
    if _attribute(message, "IFA_PROTO") == _IFAPROT_KERNEL_LL:
        return True
    return bool(message["flags"] & _IFA_F_DADFAILED)


def _address(message: Message, *, made: set[tuple[int, Network]]) -> Address:
    own = _own_address(message)
    interface = ip_interface(f"{own}/{message['prefixlen']}")
    peer = _attribute(message, "IFA_ADDRESS")
    has_peer = peer != own
    is_whole = interface.network.num_addresses == 1
    leads_to = ip_interface(f"{peer}/{message['prefixlen']}").network
    return Address(
        interface=interface,
        # Otherwise the guest's kernel would consider the whole prefix reachable on the link.
        has_route=not message["flags"] & _IFA_F_NOPREFIXROUTE
        and ((is_whole and not has_peer) or (message["index"], leads_to) in made),
        peer=peer if has_peer else "",
        broadcast=_attribute(message, "IFA_BROADCAST") or "",
        label=_attribute(message, "IFA_LABEL") or "",
        scope=message.get("scope", 0) if interface.version == 4 else 0,
        flags=message["flags"] & _CHOSEN_FLAGS,
        metric=_attribute(message, "IFA_RT_PRIORITY") or 0,
        is_deprecated=bool(message["flags"] & _IFA_F_DEPRECATED),
    )


def _table(route: Message) -> int:
    return int(_attribute(route, "RTA_TABLE") or route["table"])


def _is_of_kernel(route: Message) -> bool:
    return bool(
        _table(route) in {_RT_TABLE_MAIN, _RT_TABLE_LOCAL}
        and route["type"] in {_RTN_UNICAST, _RTN_LOCAL}
        and route["proto"] == _RTPROT_KERNEL
    )


def _is_wanted_route(route: Message) -> bool:
    if route["proto"] == _RTPROT_REDIRECT or route["flags"] & _RTM_F_CLONED:
        return False
    # The kernel itself makes the local table and IPv6's catch-all routes; others were added on purpose.
    is_own = _table(route) == _RT_TABLE_LOCAL or route["type"] in NOWHERE
    return not (is_own and route["proto"] == _RTPROT_KERNEL)


def _destination(route: Message) -> Network:
    unspecified = "0.0.0.0" if route["family"] == _AF_INET else "::"  # noqa: S104 - not bound to
    return ip_network(f"{_attribute(route, 'RTA_DST') or unspecified}/{route['dst_len']}")


def _is_remade(route: Message, remade: set[tuple[int, Network]]) -> bool:
    destination = _destination(route)
    return route["proto"] == _RTPROT_KERNEL and (
        (destination.version == 6 and (destination.is_link_local or destination.is_multicast))
        or (_attribute(route, "RTA_OIF"), destination) in remade
    )


def _route(route: Message, *, names: Mapping[int, str], unserved: list[str]) -> Route | None:
    kind = route["type"]
    hops = () if kind in NOWHERE else _next_hops(route, names=names)
    why = _why_not(route)
    if not (hops or why or kind in NOWHERE):
        return None
    metrics = _attribute(route, "RTA_METRICS") or b""
    decoded = Route(
        destination=_destination(route),
        hops=hops,
        type=kind,
        table=_table(route),
        source=(_attribute(route, "RTA_PREFSRC") or "") if hops else "",
        senders=f"{_attribute(route, 'RTA_SRC')}/{route['src_len']}" if route.get("src_len") else "",
        scope=route["scope"] if hops else 0,
        tos=route.get("tos", 0),
        protocol=route["proto"],
        metric=_attribute(route, "RTA_PRIORITY") or 0,
        mtu=_mtu(metrics),
        attributes=_further_attributes(route, metrics),
    )
    if why:
        # Without this route, the traffic would take another route.
        unserved.append(f"{decoded}: {why}; the guest has an unreachable route instead")
        return replace(decoded, type=_RTN_UNREACHABLE, hops=(), source="", scope=0, mtu=0, attributes=b"")
    return decoded


def _next_hops(route: Message, *, names: Mapping[int, str]) -> tuple[NextHop, ...]:
    ways = _attribute(route, "RTA_MULTIPATH") or [
        # A single next hop is in the message itself, with the same attributes as each of several.
        {"oif": _attribute(route, "RTA_OIF"), "hops": 0, "flags": route["flags"], "attrs": route["attrs"]}
    ]
    return tuple(
        NextHop(
            interface=names[way["oif"]],
            gateway=_gateway(way),
            onlink=bool(way["flags"] & _RTNH_F_ONLINK),
            weight=way["hops"] + 1,
        )
        for way in ways
        if way["oif"] in names
    )


def _why_not(route: Message) -> str:
    ways = _attribute(route, "RTA_MULTIPATH") or ()
    if any(_attribute(way, "RTA_ENCAP_TYPE") is not None for way in (route, *ways)):
        return "a guest cannot encapsulate packets (MPLS, seg6 and the like)"
    if (
        _attribute(route, "RTA_NH_ID") is not None
        and _attribute(route, "RTA_OIF") is None
        and not ways
        and route["type"] not in NOWHERE
    ):
        return (
            "its next hop is an object that the kernel does not explain (net.ipv4.nexthop_compat_mode is 0)"
        )
    return ""


def _mtu(metrics: bytes) -> int:
    return next(
        (int.from_bytes(value, "little") for kind, value in attributes(metrics) if kind == _RTAX_MTU), 0
    )


def _further_attributes(route: Message, metrics: bytes) -> bytes:
    """Encode the attributes that Kata's protocol cannot express; it can express an MTU."""
    found = b""
    if preference := _attribute(route, "RTA_PREF"):
        found += attribute(_RTA_PREF, bytes((preference,)))
    if realms := _attribute(route, "RTA_FLOW"):
        found += attribute(_RTA_FLOW, realms)
    if metrics and (found or any(kind != _RTAX_MTU for kind, _ in attributes(metrics))):
        found += attribute(_RTA_METRICS, metrics)
    return found


def _gateway(way: Message) -> str:
    via = _attribute(way, "RTA_VIA")
    gateway = via["addr"] if via else _attribute(way, "RTA_GATEWAY")
    return str(ip_address(gateway)) if gateway else ""


def _is_fixed(neighbour: Message) -> bool:
    if neighbour["flags"] & NTF_PROXY:
        return True
    return bool(neighbour["state"] & _NUD_PERMANENT and _attribute(neighbour, "NDA_LLADDR"))

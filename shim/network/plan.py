"""The description of a pod's network for its guest: values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.override import override

if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network


NOWHERE = frozenset({6, 7, 8, 9})
"""The types of routes without a destination: blackhole, unreachable, prohibit and throw."""

_TYPES = dict(
    enumerate(
        ("local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit", "throw"),
        start=2,
    )
)
_MAIN_TABLE = 254


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address of an interface.

    :param interface: the address, with the length of its prefix.
    :param has_route: whether the kernel has made a route to the prefix; then the guest's kernel does so, too.
    :param peer: the address at the other end of a point-to-point link; empty if there is none.
    :param broadcast: empty if there is none.
    :param label: the name under which it is listed.
    :param scope: as rtnetlink(7) numbers it.
    :param flags: the IFA_F_* bits that were set on purpose.
    :param metric: the metric of the route to the prefix; 0 for the kernel's default.
    :param is_deprecated: whether it serves only old connections.
    """

    interface: IPv4Interface | IPv6Interface
    has_route: bool = True
    peer: str = ""
    broadcast: str = ""
    label: str = ""
    scope: int = 0
    flags: int = 0
    metric: int = 0
    is_deprecated: bool = False

    @override
    def __str__(self) -> str:
        return str(self.interface)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An interface of the pod's namespace that the guest gets as a network card.

    :param index: its number in the namespace.
    :param name: its name there, and in the guest.
    :param kind: ``veth``, ``macvlan``, ``macvtap`` or ``tap``.
    :param mac: its hardware address, also that of the guest's card.
    :param mtu: in bytes.
    :param arp: whether it uses neighbour discovery.
    :param addresses: in order: the first of a prefix is the primary one.
    :param flags: IFF_PROMISC and IFF_ALLMULTI, if they are set.
    """

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    arp: bool
    addresses: tuple[Address, ...]
    flags: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NextHop:
    """One next hop of a route.

    :param interface: the name of the endpoint it leaves by.
    :param gateway: an address of either family; empty if the destination is on the link.
    :param onlink: whether the gateway is on the link although no route says so.
    :param weight: its share of the traffic among the route's next hops, at least 1.
    """

    interface: str
    gateway: str = ""
    onlink: bool = False
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route; every number is one of rtnetlink(7).

    :param destination: the prefix.
    :param hops: its next hops, which share the traffic; empty for a route that drops.
    :param type: RTN_*: unicast, blackhole, local and so on.
    :param table: 254 is the main one.
    :param source: the preferred source address; empty for the kernel's choice.
    :param senders: the prefix of the source addresses that it matches (IPv6); empty for all.
    :param scope: RT_SCOPE_*.
    :param tos: the type of service that it matches; 0 for all.
    :param protocol: RTPROT_*: its origin.
    :param metric: the lowest takes precedence among routes to a destination; 0 for the kernel's default.
    :param mtu: in bytes; 0 for the interface's.
    :param attributes: more attributes, as in the kernel's message.
    """

    destination: IPv4Network | IPv6Network
    hops: tuple[NextHop, ...] = ()
    type: int = 1
    table: int = 254
    source: str = ""
    senders: str = ""
    scope: int = 0
    tos: int = 0
    protocol: int = 3
    metric: int = 0
    mtu: int = 0
    attributes: bytes = b""

    @override
    def __str__(self) -> str:
        """Name it as ip-route(8) does."""
        words = ["route", str(self.destination) if self.destination.prefixlen else "default"]
        if self.type in _TYPES:
            words.insert(1, _TYPES[self.type])
        if self.table != _MAIN_TABLE:
            words += ["table", str(self.table)]
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule that chooses the routing table for a packet.

    :param body: the body of the kernel's message.
    :param text: its description in messages.
    """

    body: bytes
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A permanent neighbour, or a proxy entry, for which the namespace answers.

    :param interface: the name of its endpoint.
    :param ip: its address.
    :param mac: its hardware address; empty for a proxy entry.
    """

    interface: str
    ip: str
    mac: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """The guest's whole network, as one scan of the namespace found it.

    :param loopback: addresses of ``lo`` beside the kernel's own.
    :param loopback_mtu: the MTU of ``lo``, in bytes; 0 for the kernel's default.
    :param rules: in order; None if they are those that every namespace begins with.
    :param settings: kernel parameters below ``net/`` that differ from those of a new namespace.
    :param has_resolver: whether it has Docker's resolver.
    :param unserved: the parts that the guest cannot have, one line each.
    """

    endpoints: tuple[Endpoint, ...] = ()
    loopback: tuple[Address, ...] = ()
    loopback_mtu: int = 0
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] | None = None
    neighbours: tuple[Neighbour, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    has_resolver: bool = False
    unserved: tuple[str, ...] = ()

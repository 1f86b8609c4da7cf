"""What a pod's network looks like, and what the guest shall have of it: values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An interface of the pod's namespace that the guest gets as a network card.

    :param index: its number in the namespace.
    :param name: its name there, and in the guest.
    :param kind: ``veth``, ``macvlan``, ``macvtap`` or ``tap``.
    :param mac: its hardware address, which the guest's card gets too.
    :param mtu: in bytes.
    :param arp: false if neighbours are not looked for on it.
    :param addresses: with the prefix that the guest's kernel shall make a route of.
    """

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    arp: bool
    addresses: tuple[IPv4Interface | IPv6Interface, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextHop:
    """One way of a route.

    :param interface: the name of the endpoint it leaves by.
    :param gateway: an address of either family; empty if the destination is on the link.
    :param onlink: the gateway is on the link though no route says so.
    :param weight: its share of the traffic among the ways of the route, at least 1.
    """

    interface: str
    gateway: str = ""
    onlink: bool = False
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route of the main table.

    :param destination: where to.
    :param hops: at least one; several share the traffic.
    :param source: the preferred source address; empty for the kernel's choice.
    :param scope: as rtnetlink(7) numbers it.
    :param metric: the lowest wins among routes to one destination; 0 for the kernel's default.
    :param mtu: in bytes; 0 for the interface's.
    """

    destination: IPv4Network | IPv6Network
    hops: tuple[NextHop, ...]
    source: str = ""
    scope: int = 0
    metric: int = 0
    mtu: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """A neighbour whose hardware address somebody fixed.

    :param interface: the name of the endpoint it is reached by.
    :param ip: its address.
    :param mac: its hardware address.
    """

    interface: str
    ip: str
    mac: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """Everything the guest shall have: what one scan of the namespace found.

    :param has_resolver: whether Docker's resolver is there.
    """

    endpoints: tuple[Endpoint, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    has_resolver: bool = False

"""The sandbox's network: the interfaces, routes and neighbours that the host asks for.

All containers of the sandbox share it: it is the machine's own. Each request says how things shall be, so a
request that is repeated changes nothing, and what an earlier one asked for goes if this one does not.
"""

from __future__ import annotations

import _socket
import _thread
import errno

from guest.agent import addresses, files, modules, rtnetlink, uevent
from guest.agent.console import log
from guest.agent.errors import AgentError, InvalidArgument
from guest.agent.netlink import NLM_F_CREATE, NLM_F_REPLACE, Channel
from guest.agent.rtnetlink import Address, Link, NextHop, Route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guest.agent.wire import Codec, Message

_FAMILIES = (_socket.AF_INET, _socket.AF_INET6)
_SET = NLM_F_CREATE | NLM_F_REPLACE
_IPV6_SETTINGS = "/proc/sys/net/ipv6/conf"
_IPV4_SETTINGS = "/proc/sys/net/ipv4/conf"
_LOOPBACK = b"\x7f"
_LINK_LOCAL = b"\xfe\x80"
# A caller that names no PCI path asks again on "Link not found", as Kata's runtime does.
_UNPLACED_TIMEOUT_S = 3.0
# What was to be removed went with its link.
_GONE = frozenset({errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL})
_HIGHEST_WEIGHT = 256


class Network:
    """What the host has asked for so far.

    :param codec: makes the messages of the lists.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._lock = _thread.allocate_lock()
        self._routes: dict[bytes, bytes] = {}

    def update_interface(self, wanted: Message) -> None:
        """Set an interface up; one that is being plugged is waited for.

        It is known by its PCI path, else by its hardware address.

        :param wanted: types.Interface.
        :raises InvalidArgument: if an address is malformed.
        :raises AgentError: if there is no such interface, or the kernel refuses a setting.
        """
        mac = addresses.pack_mac(wanted.hwAddr)
        asked = [_address(one) for one in wanted.IPAddresses]
        modules.load("virtio_net")
        with Channel() as channel:
            if wanted.devicePath:
                uevent.interface(wanted.devicePath)
            else:
                uevent.wait_for(
                    lambda: _find(_links(channel), wanted, mac),
                    what=f"interface: {wanted.hwAddr}: Link not found",
                    timeout_s=_UNPLACED_TIMEOUT_S,
                )
            with self._lock:
                links = _links(channel)
                link = _find(links, wanted, mac)
                if link is None:
                    raise AgentError(f"interface: {wanted.hwAddr}: Link not found; plug it in first")
                _set_link(channel, link, wanted, mac, links)
                _set_addresses(channel, link, wanted.name or link.name, mac, asked)

    def update_routes(self, wanted: Sequence[Message]) -> None:
        """Make the given routes those of the main table that the host wants, in place of its former ones.

        :param wanted: types.Route messages.
        :raises InvalidArgument: if one is malformed.
        :raises AgentError: if a device does not exist, or the kernel refuses a route.
        """
        with self._lock, Channel() as channel:
            indexes = {link.name: link.index for link in _links(channel)}
            # A gateway must be reachable before a route leads through it.
            ordered = sorted(wanted, key=_has_gateway)
            routes = [(one, _route(one, indexes)) for one in ordered]
            encoded = [(one, rtnetlink.encode_route(route), route) for one, route in routes]
            kept = {body for _one, body, _route in encoded}
            for body, key in list(self._routes.items()):
                if body not in kept:
                    _remove(channel, rtnetlink.RTM_DELROUTE, key, what="former route")
                    del self._routes[body]
            for one, body, route in encoded:
                if route.source[:1] == _LOOPBACK and len(route.source) == 4:
                    # Without this the kernel takes for forged what localhost says and hears over a link.
                    files.write(f"{_IPV4_SETTINGS}/{one.device}/route_localnet", "1")
                what = f"route: {one.dest or 'default'} via {one.gateway or one.device}"
                _make(channel, rtnetlink.RTM_NEWROUTE, body, what=what)
                self._routes[body] = rtnetlink.encode_route_key(route)

    def add_neighbours(self, wanted: Iterable[Message]) -> None:
        """Enter neighbours whose hardware address the host knows.

        :param wanted: types.ARPNeighbor messages.
        :raises InvalidArgument: if one is malformed.
        :raises AgentError: if a device does not exist, or the kernel refuses an entry.
        """
        with self._lock, Channel() as channel:
            indexes = {link.name: link.index for link in _links(channel)}
            for one in wanted:
                if one.toIPAddress is None:
                    raise InvalidArgument("neighbour: the request has no address; send it")
                body = rtnetlink.encode_neighbour(
                    _index(one.device, indexes),
                    packed=addresses.pack(one.toIPAddress.address),
                    mac=addresses.pack_mac(one.lladdr) if one.lladdr else b"",
                    state=one.state & 0xFFFF or rtnetlink.NUD_PERMANENT,
                    flags=one.flags & 0xFF,
                )
                what = f"neighbour: {one.toIPAddress.address} on {one.device}"
                _make(channel, rtnetlink.RTM_NEWNEIGH, body, what=what)

    def interfaces(self) -> list[Message]:
        """List all interfaces with their addresses.

        :returns: types.Interface messages.
        :raises OSError: if the kernel refuses.
        """
        with Channel() as channel:
            links, present = _links(channel), _addresses(channel)
        return [
            self._codec.new(
                "types.Interface",
                device=link.name,
                name=link.name,
                hwAddr=link.mac.hex(":"),
                mtu=link.mtu,
                raw_flags=link.flags,
                IPAddresses=[
                    self._codec.new(
                        "types.IPAddress",
                        family=_FAMILIES.index(addresses.family_of(one.packed)),
                        address=addresses.text_of(one.packed),
                        mask=str(one.prefix),
                    )
                    for one in present
                    if one.index == link.index
                ],
            )
            for link in links
        ]

    def routes(self) -> list[Message]:
        """List the routes of the main table.

        :returns: types.Route messages, IPv4 first.
        :raises OSError: if the kernel refuses.
        """
        with Channel() as channel:
            names = {link.index: link.name for link in _links(channel)}
            present = [
                route
                for family in _FAMILIES
                for route in channel.dump(
                    rtnetlink.RTM_GETROUTE, rtnetlink.all_routes(family), decode=rtnetlink.decode_route
                )
                if route.table == rtnetlink.RT_TABLE_MAIN and route.hops
            ]
        return [self._describe(route, names) for route in present]

    def _describe(self, route: Route, names: dict[int, str]) -> Message:
        hops = [
            self._codec.new(
                "types.NextHop",
                gateway=addresses.text_of(hop.gateway),
                device=names.get(hop.index, ""),
                weight=hop.weight,
                flags=hop.flags,
            )
            for hop in route.hops
        ]
        return self._codec.new(
            "types.Route",
            dest=f"{addresses.text_of(route.dest)}/{route.prefix}" if route.dest else "",
            gateway=hops[0].gateway,
            device=hops[0].device,
            source=addresses.text_of(route.source),
            scope=route.scope,
            family=_FAMILIES.index(route.family),
            flags=hops[0].flags,
            mtu=route.mtu,
            metric=route.metric,
            next_hops=hops if len(hops) > 1 else [],
        )


def _links(channel: Channel) -> list[Link]:
    return channel.dump(rtnetlink.RTM_GETLINK, rtnetlink.ALL_LINKS, decode=rtnetlink.decode_link)


def _addresses(channel: Channel) -> list[Address]:
    return [
        address
        for family in _FAMILIES
        for address in channel.dump(
            rtnetlink.RTM_GETADDR, rtnetlink.all_addresses(family), decode=rtnetlink.decode_address
        )
    ]


def _find(links: list[Link], wanted: Message, mac: bytes) -> Link | None:
    candidates = [link for link in links if not link.flags & rtnetlink.IFF_LOOPBACK]
    if wanted.devicePath:
        names = uevent.virtio_children(wanted.devicePath, "net")
        return next((link for link in candidates if link.name in names), None)
    return next((link for link in candidates if link.mac == mac), None)


def _set_link(channel: Channel, link: Link, wanted: Message, mac: bytes, links: list[Link]) -> None:
    name = wanted.name or link.name
    other = next((one for one in links if one.name == name and one.index != link.index), None)
    if other is not None:
        _rename(channel, other, f"swapped{other.index}")
    new_name, new_mac = name if name != link.name else "", mac if mac != link.mac else b""
    if new_name or new_mac:
        # Neither can be changed under a link that is up; the routes go with it.
        _lower(channel, link)
    # Its addresses are the pod's own, proven on the host already, and must serve from the first packet on.
    _set_ipv6(link.name, "accept_dad", "0")
    flags = rtnetlink.IFF_UP | (wanted.raw_flags & rtnetlink.IFF_NOARP)
    mask = rtnetlink.IFF_UP | rtnetlink.IFF_NOARP
    body = rtnetlink.encode_link(
        link.index, name=new_name, mac=new_mac, mtu=wanted.mtu, flags=flags, mask=mask
    )
    _make(channel, rtnetlink.RTM_NEWLINK, body, what=f"interface: {name}, MTU {wanted.mtu}")
    if other is not None:
        _rename(channel, other, link.name)


def _rename(channel: Channel, link: Link, name: str) -> None:
    _lower(channel, link)
    up = link.flags & rtnetlink.IFF_UP
    body = rtnetlink.encode_link(link.index, name=name, flags=up, mask=rtnetlink.IFF_UP)
    _make(channel, rtnetlink.RTM_NEWLINK, body, what=f"interface: {link.name}: new name {name}")


def _lower(channel: Channel, link: Link) -> None:
    body = rtnetlink.encode_link(link.index, mask=rtnetlink.IFF_UP)
    _make(channel, rtnetlink.RTM_NEWLINK, body, what=f"interface: {link.name}: down")


def _set_ipv6(link: str, setting: str, value: str) -> None:
    path = f"{_IPV6_SETTINGS}/{link}/{setting}"
    # A link with too small an MTU has no IPv6.
    if files.exists(path):
        files.write(path, value)


def _has_ipv6() -> bool:
    path = f"{_IPV6_SETTINGS}/all/disable_ipv6"
    return files.exists(path) and files.read(path).strip() == "0"


def _set_addresses(
    channel: Channel, link: Link, name: str, mac: bytes, asked: list[tuple[bytes, int]]
) -> None:
    if not _has_ipv6() and any(len(packed) == 16 for packed, _prefix in asked):
        log(f"interface: {name}: IPv6 is off in the guest; its IPv6 addresses are left out")
        asked = [one for one in asked if len(one[0]) == 4]
    given_link_local = any(packed.startswith(_LINK_LOCAL) for packed, _prefix in asked)
    for address in _addresses(channel):
        # What came by DHCP or router advertisement is not permanent, and none of the host's business.
        stale = (
            address.index == link.index
            and address.flags & rtnetlink.IFA_F_PERMANENT
            and (address.packed, address.prefix) not in asked
            and (given_link_local or address.packed != addresses.link_local(mac))
        )
        if stale:
            # Removed first: an address takes those with it that were secondary to it.
            _remove(
                channel,
                rtnetlink.RTM_DELADDR,
                rtnetlink.encode_address(address),
                what=f"old address of {name}",
            )
    for packed, prefix in asked:
        flags = rtnetlink.IFA_F_NODAD if len(packed) == 16 else 0
        address = Address(index=link.index, packed=packed, prefix=prefix, flags=flags)
        what = f"interface: {name}: address {addresses.text_of(packed)}/{prefix}"
        _make(channel, rtnetlink.RTM_NEWADDR, rtnetlink.encode_address(address), what=what)


def _address(message: Message) -> tuple[bytes, int]:
    packed = addresses.pack(message.address)
    return packed, addresses.prefix_length(message.mask, packed)


def _has_gateway(route: Message) -> bool:
    return bool(route.gateway) or any(hop.gateway for hop in route.next_hops)


def _route(message: Message, indexes: dict[str, int]) -> Route:
    if not 0 <= message.family < len(_FAMILIES):
        raise InvalidArgument(f"route: family {message.family}: not known; use 0 for IPv4, 1 for IPv6")
    family = _FAMILIES[message.family]
    dest, prefix = addresses.pack_network(message.dest) if message.dest else (b"", 0)
    source, source_prefix = addresses.pack_network(message.source) if message.source else (b"", 0)
    if any(packed and addresses.family_of(packed) != family for packed in (dest, source)):
        raise InvalidArgument(f"route: {message.dest}: it mixes IPv4 and IPv6; send one family")
    if source_prefix != len(source) * 8:
        raise InvalidArgument(f"route: {message.dest}: source {message.source} is no address; send one")
    return Route(
        family=family,
        dest=dest if prefix else b"",
        prefix=prefix,
        hops=[_next_hop(one, family, indexes, weight=one.weight) for one in message.next_hops]
        or [_next_hop(message, family, indexes, weight=1)],
        source=source,
        scope=message.scope & 0xFF,
        table=_table(dest),
        metric=message.metric,
        mtu=message.mtu,
    )


def _table(dest: bytes) -> int:
    # In any other table it would come after the kernel's own route to all of the loopback network.
    is_loopback = dest[:1] == _LOOPBACK and len(dest) == 4
    return rtnetlink.RT_TABLE_LOCAL if is_loopback else rtnetlink.RT_TABLE_MAIN


def _next_hop(message: Message, family: int, indexes: dict[str, int], *, weight: int) -> NextHop:
    gateway = addresses.pack(message.gateway) if message.gateway else b""
    if gateway and family == _socket.AF_INET6 and len(gateway) == 4:
        raise InvalidArgument(f"route: gateway {message.gateway}: IPv6 cannot go through IPv4; use IPv6")
    return NextHop(
        index=_index(message.device, indexes),
        gateway=gateway,
        weight=min(max(1, weight), _HIGHEST_WEIGHT),
        flags=message.flags & rtnetlink.RTNH_F_ONLINK,
    )


def _index(device: str, indexes: dict[str, int]) -> int:
    if device not in indexes:
        raise AgentError(f"network: {device}: Link not found; send its interface first")
    return indexes[device]


def _make(channel: Channel, kind: int, body: bytes, *, what: str) -> None:
    try:
        channel.change(kind, body, flags=0 if kind == rtnetlink.RTM_NEWLINK else _SET)
    except OSError as error:
        raise AgentError(f"{what}: {error.strerror}; see what the pod's network has there") from error


def _remove(channel: Channel, kind: int, body: bytes, *, what: str) -> None:
    try:
        channel.change(kind, body)
    except OSError as error:
        if error.errno not in _GONE:
            raise AgentError(f"{what}: {error.strerror}; see the guest's console") from error

"""The sandbox's network: the interfaces, routes and neighbours that the host asks for.

All containers of the sandbox share the machine's own network. Each request describes the whole wanted state.
So a repeated request changes nothing, and objects that only an earlier request asked for are removed.
"""

from __future__ import annotations

import _socket
import _thread
import errno

from guest.agent import addresses, files, modules, rtnetlink, uevent
from guest.agent.console import log
from guest.agent.errors import AgentError, InvalidArgument
from guest.agent.netlink import NLM_F_CREATE, NLM_F_REPLACE, NetlinkChannel, await_carrier
from guest.agent.rtnetlink import KernelHop, KernelRoute, Link, LinkAddress
from guest.agent.rules import Rules
from guest.agent.sysctl import Settings

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
# A caller that gives no PCI path, such as Kata's runtime, repeats the request after "Link not found".
_UNPLACED_TIMEOUT_S = 3.0
_CARRIER_TIMEOUT_S = 1.0
# It was removed together with its link.
_GONE = frozenset({errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL})
_HIGHEST_WEIGHT = 256
_NOWHERE = frozenset({6, 7, 8, 9})  # blackhole, unreachable, prohibit, throw
_TYPE_LOOPBACK = "loopback"


class GuestNetwork:
    """The host's requests so far.

    :param codec: makes the messages of the lists.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._lock = _thread.allocate_lock()
        self._routes: dict[bytes, bytes] = {}
        self._addresses: dict[tuple[int, bytes, int], bytes] = {}
        self._neighbours: list[bytes] = []
        self._set_up: set[int] = set()
        self._rules = Rules()
        self._settings = Settings()

    def update_interface(self, wanted: Message) -> None:
        """Set an interface up; one that is being plugged is waited for.

        It is known by its PCI path, else by its hardware address; the loopback by its type.

        :param wanted: types.Interface.
        :raises InvalidArgument: if an address is malformed.
        :raises AgentError: if there is no such interface, or the kernel refuses a setting.
        """
        mac = addresses.pack_mac(wanted.hwAddr)
        asked = [_address(one) for one in wanted.IPAddresses]
        if wanted.type == _TYPE_LOOPBACK:
            self._update_loopback(wanted, asked)
            return
        modules.load("virtio_net")
        with NetlinkChannel() as channel:
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
                if link.index not in self._set_up:
                    self._set_up.add(link.index)
                    self._settings.forget(wanted.name or link.name)
                name = wanted.name or link.name
                present = [one for one in _addresses(channel) if one.index == link.index]
                # Addresses from DHCP or router advertisements are not permanent, and not the host's.
                stale = [one for one in present if one.flags & rtnetlink.IFA_F_PERMANENT]
                if not any(one.packed.startswith(_LINK_LOCAL) for one in asked):
                    stale = [one for one in stale if one.packed != addresses.link_local(mac)]
                self._set_addresses(channel, link.index, name, asked, present=present, stale=stale)

    def _update_loopback(self, wanted: Message, asked: list[LinkAddress]) -> None:
        with self._lock, NetlinkChannel() as channel:
            link = next(one for one in _links(channel) if one.flags & rtnetlink.IFF_LOOPBACK)
            if link.mtu != wanted.mtu:
                body = rtnetlink.encode_link(link.index, mtu=wanted.mtu)
                _make(channel, rtnetlink.RTM_NEWLINK, body, what=f"interface: {link.name}, MTU {wanted.mtu}")
            present = [one for one in _addresses(channel) if one.index == link.index]
            for one in asked:
                one.flags &= ~rtnetlink.IFA_F_NODAD  # no other link can have these
            # The kernel also has addresses there, and containers may add some.
            stale = [one for one in present if (one.index, one.packed, one.prefix) in self._addresses]
            self._set_addresses(channel, link.index, link.name, asked, present=present, stale=stale)

    def _set_addresses(
        self,
        channel: NetlinkChannel,
        index: int,
        name: str,
        asked: list[LinkAddress],
        *,
        present: list[LinkAddress],
        stale: list[LinkAddress],
    ) -> None:
        """Give a link addresses, and remove stale ones that are not among them."""
        if any(len(one.packed) == 16 for one in asked) and not _has_ipv6():
            log(f"interface: {name}: IPv6 is off in the guest; its IPv6 addresses are left out")
            asked = [one for one in asked if len(one.packed) == 4]
        wanted = {}
        for one in asked:
            one.index = index
            wanted[index, one.packed, one.prefix] = rtnetlink.encode_address(one)
        changed = {key for key, body in self._addresses.items() if key in wanted and wanted[key] != body}
        for one in present:
            key = index, one.packed, one.prefix
            if key in changed or (key not in wanted and one in stale):
                # Removed first: the secondary addresses of an address disappear with it.
                body = rtnetlink.encode_address(one)
                _remove(channel, rtnetlink.RTM_DELADDR, body, what=f"old address of {name}")
        for (_index, packed, prefix), body in wanted.items():
            what = f"interface: {name}: address {addresses.text_of(packed)}/{prefix}"
            _make(channel, rtnetlink.RTM_NEWADDR, body, what=what)
        self._addresses = {key: body for key, body in self._addresses.items() if key[0] != index} | wanted

    def update_routes(
        self, wanted: Sequence[Message], *, rules: Message | None = None, settings: Message | None = None
    ) -> list[str]:
        """Replace the host's previous routes, rules and parameters by the given ones.

        :param wanted: types.Route messages.
        :param rules: hako.Rules; None to leave them as they are.
        :param settings: hako.Settings; None to leave them as they are.
        :returns: the rules and parameters that the kernel refuses, with reasons.
        :raises InvalidArgument: if a route is malformed.
        :raises AgentError: if a device does not exist, or the kernel refuses a route.
        """
        with self._lock, NetlinkChannel() as channel:
            refused: list[str] = []
            if settings is not None:
                _settle(channel, settings.values)
                refused = self._settings.update(settings.values)
            self._set_routes(channel, wanted)
            if rules is not None:
                refused += self._rules.update(channel, rules.rules)
            return refused

    def _set_routes(self, channel: NetlinkChannel, wanted: Sequence[Message]) -> None:
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
                # Without this, the kernel considers localhost's packets on a link forged.
                files.write(f"{_IPV4_SETTINGS}/{one.device}/route_localnet", "1")
            what = f"route: {one.dest or 'default'} via {one.gateway or one.device}"
            _make(channel, rtnetlink.RTM_NEWROUTE, body, what=what)
            self._routes[body] = rtnetlink.encode_route_key(route)

    def add_neighbours(self, wanted: Iterable[Message], *, complete: bool) -> None:
        """Enter neighbours whose hardware address the host knows.

        :param wanted: types.ARPNeighbor messages.
        :param complete: remove earlier entries that are not among them.
        :raises InvalidArgument: if one is malformed.
        :raises AgentError: if a device does not exist, or the kernel refuses an entry.
        """
        with self._lock, NetlinkChannel() as channel:
            indexes = {link.name: link.index for link in _links(channel)}
            entered = []
            for one in wanted:
                if one.toIPAddress is None:
                    raise InvalidArgument("neighbour: the request has no address; send it")
                index, packed = _index(one.device, indexes), addresses.pack(one.toIPAddress.address)
                mac = addresses.pack_mac(one.lladdr) if one.lladdr else b""
                state, flags = one.state & 0xFFFF or rtnetlink.NUD_PERMANENT, one.flags & 0xFF
                body = rtnetlink.encode_neighbour(index, packed=packed, mac=mac, state=state, flags=flags)
                what = f"neighbour: {one.toIPAddress.address} on {one.device}"
                _make(channel, rtnetlink.RTM_NEWNEIGH, body, what=what)
                entered.append(
                    rtnetlink.encode_neighbour(index, packed=packed, mac=b"", state=0, flags=flags)
                )
            for body in self._neighbours:
                if body in entered:
                    continue
                if complete:
                    _remove(channel, rtnetlink.RTM_DELNEIGH, body, what="former neighbour")
                else:
                    entered.append(body)
            self._neighbours = entered

    def interfaces(self) -> list[Message]:
        """List all interfaces with their addresses.

        :returns: types.Interface messages.
        :raises OSError: if the kernel refuses.
        """
        with NetlinkChannel() as channel:
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
        with NetlinkChannel() as channel:
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

    def _describe(self, route: KernelRoute, names: dict[int, str]) -> Message:
        hops = [
            self._codec.new(
                "hako.NextHop",
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


def _settle(channel: NetlinkChannel, settings: dict[str, str]) -> None:
    """Wait until links are up before they get an MTU for IPv6: otherwise the kernel would overwrite it."""
    names = [
        name.split("/")[-2]
        for name in settings
        if name.startswith("net/ipv6/conf/") and name.endswith("/mtu")
    ]
    for name in names:
        await_carrier(name, timeout_s=_CARRIER_TIMEOUT_S)
    if names:
        _links(channel)  # this takes the lock that the kernel holds while it handles a link's change


def _links(channel: NetlinkChannel) -> list[Link]:
    return channel.dump(rtnetlink.RTM_GETLINK, rtnetlink.ALL_LINKS, decode=rtnetlink.decode_link)


def _addresses(channel: NetlinkChannel) -> list[LinkAddress]:
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


def _set_link(channel: NetlinkChannel, link: Link, wanted: Message, mac: bytes, links: list[Link]) -> None:
    name = wanted.name or link.name
    other = next((one for one in links if one.name == name and one.index != link.index), None)
    if other is not None:
        _rename(channel, other, f"swapped{other.index}")
    new_name, new_mac = name if name != link.name else "", mac if mac != link.mac else b""
    if new_name or new_mac:
        # Neither can be changed under a link that is up; the routes go with it.
        _lower(channel, link)
    # The pod's addresses were already checked on the host, and must work from the first packet on.
    _set_ipv6(link.name, "accept_dad", "0")
    settable = rtnetlink.IFF_NOARP | rtnetlink.IFF_PROMISC | rtnetlink.IFF_ALLMULTI
    flags = rtnetlink.IFF_UP | (wanted.raw_flags & settable)
    mask = rtnetlink.IFF_UP | settable
    body = rtnetlink.encode_link(
        link.index, name=new_name, mac=new_mac, mtu=wanted.mtu, flags=flags, mask=mask
    )
    _make(channel, rtnetlink.RTM_NEWLINK, body, what=f"interface: {name}, MTU {wanted.mtu}")
    if other is not None:
        _rename(channel, other, link.name)


def _rename(channel: NetlinkChannel, link: Link, name: str) -> None:
    _lower(channel, link)
    up = link.flags & rtnetlink.IFF_UP
    body = rtnetlink.encode_link(link.index, name=name, flags=up, mask=rtnetlink.IFF_UP)
    _make(channel, rtnetlink.RTM_NEWLINK, body, what=f"interface: {link.name}: new name {name}")


def _lower(channel: NetlinkChannel, link: Link) -> None:
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


def _address(message: Message) -> LinkAddress:
    packed = addresses.pack(message.address)
    flags = rtnetlink.IFA_F_NODAD if len(packed) == 16 else 0
    details = message.details
    if details is None:
        prefix = addresses.prefix_length(message.mask, packed)
        return LinkAddress(index=0, packed=packed, prefix=prefix, flags=flags)
    return LinkAddress(
        index=0,
        packed=packed,
        prefix=details.prefix,
        flags=flags | details.flags,
        scope=details.scope & 0xFF,
        peer=addresses.pack(details.peer) if details.peer else b"",
        broadcast=addresses.pack(details.broadcast) if details.broadcast else b"",
        label=details.label,
        metric=details.metric,
        deprecated=details.deprecated,
    )


def _has_gateway(route: Message) -> bool:
    return bool(route.gateway) or any(hop.gateway for hop in route.next_hops)


def _route(message: Message, indexes: dict[str, int]) -> KernelRoute:
    if not 0 <= message.family < len(_FAMILIES):
        raise InvalidArgument(f"route: family {message.family}: not known; use 0 for IPv4, 1 for IPv6")
    family = _FAMILIES[message.family]
    dest, prefix = addresses.pack_network(message.dest) if message.dest else (b"", 0)
    source, source_prefix = addresses.pack_network(message.source) if message.source else (b"", 0)
    senders, senders_prefix = addresses.pack_network(message.senders) if message.senders else (b"", 0)
    if any(packed and addresses.family_of(packed) != family for packed in (dest, source, senders)):
        raise InvalidArgument(f"route: {message.dest}: it mixes IPv4 and IPv6; send one family")
    if source_prefix != len(source) * 8:
        raise InvalidArgument(f"route: {message.dest}: source {message.source} is not an address; send one")
    return KernelRoute(
        family=family,
        dest=dest if prefix else b"",
        prefix=prefix,
        hops=_next_hops(message, family, indexes),
        source=source,
        scope=message.scope & 0xFF,
        table=message.table or _table(dest),
        metric=message.metric,
        mtu=message.mtu,
        protocol=message.protocol & 0xFF or rtnetlink.RTPROT_BOOT,
        kind=message.type & 0xFF or rtnetlink.RTN_UNICAST,
        tos=message.tos & 0xFF,
        senders=senders,
        senders_prefix=senders_prefix,
        attributes=message.attributes,
    )


def _table(dest: bytes) -> int:
    # In another table, the kernel's own route to the whole loopback network would take precedence.
    is_loopback = dest[:1] == _LOOPBACK and len(dest) == 4
    return rtnetlink.RT_TABLE_LOCAL if is_loopback else rtnetlink.RT_TABLE_MAIN


def _next_hops(message: Message, family: int, indexes: dict[str, int]) -> list[KernelHop]:
    if message.type in _NOWHERE:
        return []
    several = [_next_hop(one, family, indexes, weight=one.weight) for one in message.next_hops]
    return several or [_next_hop(message, family, indexes, weight=1)]


def _next_hop(message: Message, family: int, indexes: dict[str, int], *, weight: int) -> KernelHop:
    gateway = addresses.pack(message.gateway) if message.gateway else b""
    if gateway and family == _socket.AF_INET6 and len(gateway) == 4:
        raise InvalidArgument(f"route: gateway {message.gateway}: IPv6 cannot go through IPv4; use IPv6")
    return KernelHop(
        index=_index(message.device, indexes),
        gateway=gateway,
        weight=min(max(1, weight), _HIGHEST_WEIGHT),
        flags=message.flags & rtnetlink.RTNH_F_ONLINK,
    )


def _index(device: str, indexes: dict[str, int]) -> int:
    if device not in indexes:
        raise AgentError(f"network: {device}: Link not found; send its interface first")
    return indexes[device]


def _make(channel: NetlinkChannel, kind: int, body: bytes, *, what: str) -> None:
    try:
        channel.change(kind, body, flags=0 if kind == rtnetlink.RTM_NEWLINK else _SET)
    except OSError as error:
        raise AgentError(f"{what}: {error.strerror}; compare it with the pod's network") from error


def _remove(channel: NetlinkChannel, kind: int, body: bytes, *, what: str) -> None:
    try:
        channel.change(kind, body)
    except OSError as error:
        if error.errno not in _GONE:
            raise AgentError(f"{what}: {error.strerror}; see the guest's console") from error

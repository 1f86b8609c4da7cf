"""The kernel's links, addresses, routes and neighbours as its routing messages show them.

Layout: include/uapi/linux/{rtnetlink,if_link,if_addr,neighbour}.h, see ``man 7 rtnetlink``. Addresses are
packed, in network byte order, here and everywhere behind :mod:`guest.agent.addresses`.
"""

from __future__ import annotations

import _socket
import struct

from guest.agent.netlink import attribute, attributes

RTM_NEWLINK, RTM_GETLINK = 16, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
IFF_UP, IFF_LOOPBACK, IFF_NOARP, IFF_PROMISC, IFF_ALLMULTI = 0x1, 0x8, 0x80, 0x100, 0x200
IFA_F_NODAD, IFA_F_PERMANENT = 0x02, 0x80
_RT_TABLE_UNSPEC, RT_TABLE_MAIN, RT_TABLE_LOCAL = 0, 254, 255
_RT_SCOPE_NOWHERE = 255
RTPROT_BOOT = 3
RTNH_F_ONLINK = 4
NUD_PERMANENT = 0x80
RTN_UNICAST = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_BROADCAST, _IFA_CACHEINFO = 1, 2, 3, 4, 6
_IFA_FLAGS, _IFA_RT_PRIORITY = 8, 9
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 2, 4, 5, 6, 7
_RTA_METRICS, _RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 8, 9, 15, 18
_RTAX_MTU = 2
_NDA_DST, _NDA_LLADDR = 1, 2
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEXT_HOP = struct.Struct("=HBBi")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_LIFETIMES = struct.Struct("=IIII")
_DEPRECATED = _LIFETIMES.pack(0, 0xFFFFFFFF, 0, 0)
_U32 = struct.Struct("=I")
_FAMILY = struct.Struct("=H")
_FAMILIES = {4: _socket.AF_INET, 16: _socket.AF_INET6}

ALL_LINKS = _LINK.pack(_socket.AF_UNSPEC, 0, 0, 0, 0)


class Link:
    """A network interface.

    :param index: the kernel's number of it.
    :param name: its name.
    :param mac: its hardware address; empty if it has none.
    :param mtu: in bytes.
    :param flags: IFF_* bits.
    """

    __slots__ = ("flags", "index", "mac", "mtu", "name")

    def __init__(self, *, index: int, name: str, mac: bytes, mtu: int, flags: int) -> None:
        self.index, self.name, self.mac, self.mtu, self.flags = index, name, mac, mtu, flags


def decode_link(body: bytes) -> Link:
    """Decode a link.

    :param body: of an RTM_NEWLINK message.
    :returns: the link.
    :raises ValueError: if it is malformed.
    """
    _family, _type, index, flags, _change = _unpack(_LINK, body)
    found = attributes(body[_LINK.size :])
    name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
    mtu = _unpack(_U32, found.get(_IFLA_MTU, bytes(4)))[0]
    return Link(index=index, name=name, mac=found.get(_IFLA_ADDRESS, b""), mtu=mtu, flags=flags)


def encode_link(
    index: int, *, name: str = "", mac: bytes = b"", mtu: int | None = None, flags: int = 0, mask: int = 0
) -> bytes:
    """Encode a change of a link.

    :param index: which.
    :param name: the new name; empty to leave it.
    :param mac: the new hardware address; empty to leave it.
    :param mtu: the new MTU in bytes; None to leave it.
    :param flags: IFF_* bits to set.
    :param mask: the bits to change.
    :returns: the body of an RTM_NEWLINK message.
    """
    body = _LINK.pack(_socket.AF_UNSPEC, 0, index, flags, mask)
    if mac:
        body += attribute(_IFLA_ADDRESS, mac)
    if mtu is not None:
        body += attribute(_IFLA_MTU, _U32.pack(mtu))
    if name:
        body += attribute(_IFLA_IFNAME, name.encode() + b"\0")
    return body


class LinkAddress:
    """An address of a link.

    :param index: the link.
    :param packed: the address.
    :param prefix: length of its network's prefix in bits.
    :param flags: IFA_F_* bits.
    :param scope: RT_SCOPE_*; the kernel chooses that of an IPv6 address.
    :param peer: the address at the other end of a point-to-point link; empty if there is none.
    :param broadcast: empty if there is none; None for the last of the network.
    :param label: its label in lists; empty for the link's name.
    :param metric: of the route to the network; 0 for the kernel's default.
    :param deprecated: whether it serves old connections only.
    """

    __slots__ = (
        "broadcast",
        "deprecated",
        "flags",
        "index",
        "label",
        "metric",
        "packed",
        "peer",
        "prefix",
        "scope",
    )

    def __init__(
        self,
        *,
        index: int,
        packed: bytes,
        prefix: int,
        flags: int = 0,
        scope: int = 0,
        peer: bytes = b"",
        broadcast: bytes | None = None,
        label: str = "",
        metric: int = 0,
        deprecated: bool = False,
    ) -> None:
        self.index, self.packed, self.prefix, self.flags, self.scope = index, packed, prefix, flags, scope
        self.peer, self.broadcast, self.label = peer, broadcast, label
        self.metric, self.deprecated = metric, deprecated


def all_addresses(family: int) -> bytes:
    """Encode the request for all addresses.

    :param family: AF_INET or AF_INET6.
    :returns: the body of an RTM_GETADDR message.
    """
    return _ADDRESS.pack(family, 0, 0, 0, 0)


def decode_address(body: bytes) -> LinkAddress:
    """Decode an address.

    :param body: of an RTM_NEWADDR message.
    :returns: the address.
    :raises ValueError: if it is malformed.
    """
    _family, prefix, flags, scope, index = _unpack(_ADDRESS, body)
    found = attributes(body[_ADDRESS.size :])
    if _IFA_FLAGS in found:
        flags = _unpack(_U32, found[_IFA_FLAGS])[0]
    # IFA_ADDRESS is the peer's where there is one; IPv6 has IFA_LOCAL only then.
    far = found.get(_IFA_ADDRESS, b"")
    packed = found.get(_IFA_LOCAL) or far
    _family_of(packed)
    peer = far if far != packed else b""
    return LinkAddress(index=index, packed=packed, prefix=prefix, flags=flags, scope=scope, peer=peer)


def encode_address(address: LinkAddress) -> bytes:
    """Encode an address.

    :param address: the address.
    :returns: the body of an RTM_NEWADDR or RTM_DELADDR message.
    """
    family = _family_of(address.packed)
    body = _ADDRESS.pack(family, address.prefix, address.flags & 0xFF, address.scope, address.index)
    body += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.peer or address.packed)
    broadcast = address.broadcast
    if broadcast is None and family == _socket.AF_INET and address.prefix < 31:
        host = (1 << 32 - address.prefix) - 1
        broadcast = (int.from_bytes(address.packed, "big") | host).to_bytes(4, "big")
    if broadcast:
        body += attribute(_IFA_BROADCAST, broadcast)
    if address.label:
        body += attribute(_IFA_LABEL, address.label.encode() + b"\0")
    if address.flags > 0xFF:
        body += attribute(_IFA_FLAGS, _U32.pack(address.flags))
    if address.metric:
        body += attribute(_IFA_RT_PRIORITY, _U32.pack(address.metric))
    return body + (attribute(_IFA_CACHEINFO, _DEPRECATED) if address.deprecated else b"")


class KernelHop:
    """Where a route leads.

    :param index: the link.
    :param gateway: of either family; empty for destinations on the link itself.
    :param weight: its share among several.
    :param flags: RTNH_F_* bits.
    """

    __slots__ = ("flags", "gateway", "index", "weight")

    def __init__(self, *, index: int, gateway: bytes = b"", weight: int = 1, flags: int = 0) -> None:
        self.index, self.gateway, self.weight, self.flags = index, gateway, weight, flags


class KernelRoute:
    """A route.

    :param family: AF_INET or AF_INET6.
    :param dest: network; empty for the default route.
    :param prefix: length of the network's prefix in bits.
    :param hops: where it leads, if anywhere; several share the traffic.
    :param source: the address that this machine prefers on it; empty for any.
    :param scope: RT_SCOPE_*.
    :param metric: the lowest takes precedence; 0 for the kernel's default.
    :param mtu: in bytes; 0 for the link's.
    :param table: routing table.
    :param protocol: RTPROT_*: who made it.
    :param kind: RTN_*: unicast, blackhole, local and so on.
    :param tos: the type of service that it is for; 0 for all.
    :param senders: the network of senders that it matches; empty for all.
    :param senders_prefix: length of that network's prefix in bits.
    :param attributes: more attributes, encoded; they take precedence over the MTU.
    """

    __slots__ = (
        "attributes",
        "dest",
        "family",
        "hops",
        "kind",
        "metric",
        "mtu",
        "prefix",
        "protocol",
        "scope",
        "senders",
        "senders_prefix",
        "source",
        "table",
        "tos",
    )

    def __init__(
        self,
        *,
        family: int,
        dest: bytes,
        prefix: int,
        hops: list[KernelHop],
        source: bytes = b"",
        scope: int = 0,
        metric: int = 0,
        mtu: int = 0,
        table: int = RT_TABLE_MAIN,
        protocol: int = RTPROT_BOOT,
        kind: int = RTN_UNICAST,
        tos: int = 0,
        senders: bytes = b"",
        senders_prefix: int = 0,
        attributes: bytes = b"",
    ) -> None:
        self.family, self.dest, self.prefix, self.hops = family, dest, prefix, hops
        self.source, self.scope, self.metric, self.mtu = source, scope, metric, mtu
        self.table, self.protocol, self.kind, self.tos = table, protocol, kind, tos
        self.senders, self.senders_prefix, self.attributes = senders, senders_prefix, attributes


def all_routes(family: int) -> bytes:
    """Encode the request for all routes.

    :param family: AF_INET or AF_INET6.
    :returns: the body of an RTM_GETROUTE message.
    """
    return _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)


def decode_route(body: bytes) -> KernelRoute:
    """Decode a route.

    :param body: of an RTM_NEWROUTE message.
    :returns: the route.
    :raises ValueError: if it is malformed.
    """
    family, prefix, _source, tos, table, protocol, scope, kind, flags = _unpack(_ROUTE, body)
    found = attributes(body[_ROUTE.size :])
    if _RTA_MULTIPATH in found:
        hops = _decode_hops(found[_RTA_MULTIPATH])
    elif _RTA_OIF in found:
        index = _unpack(_U32, found[_RTA_OIF])[0]
        hops = [KernelHop(index=index, gateway=_gateway(found), flags=flags & RTNH_F_ONLINK)]
    else:
        hops = []
    metrics = attributes(found.get(_RTA_METRICS, b""))
    return KernelRoute(
        family=family,
        dest=found.get(_RTA_DST, b""),
        prefix=prefix,
        hops=hops,
        source=found.get(_RTA_PREFSRC, b""),
        scope=scope,
        metric=_unpack(_U32, found.get(_RTA_PRIORITY, bytes(4)))[0],
        mtu=_unpack(_U32, metrics.get(_RTAX_MTU, bytes(4)))[0],
        table=_unpack(_U32, found[_RTA_TABLE])[0] if _RTA_TABLE in found else table,
        protocol=protocol,
        kind=kind,
        tos=tos,
    )


def _decode_hops(data: bytes) -> list[KernelHop]:
    hops = []
    position = 0
    while position < len(data):
        size, flags, share, index = _unpack(_NEXT_HOP, data[position:])
        if not _NEXT_HOP.size <= size <= len(data) - position:
            raise ValueError(f"next hop of {size} bytes in the {len(data) - position} that are left")
        gateway = _gateway(attributes(data[position + _NEXT_HOP.size : position + size]))
        hops.append(KernelHop(index=index, gateway=gateway, weight=share + 1, flags=flags & RTNH_F_ONLINK))
        position += size + -size % 4
    return hops


def _gateway(found: dict[int, bytes]) -> bytes:
    return found[_RTA_VIA][_FAMILY.size :] if _RTA_VIA in found else found.get(_RTA_GATEWAY, b"")


def encode_route(route: KernelRoute) -> bytes:
    """Encode a route.

    :param route: the route.
    :returns: the body of an RTM_NEWROUTE message.
    """
    body = b""
    if route.source:
        body += attribute(_RTA_PREFSRC, route.source)
    if route.mtu and not route.attributes:
        body += attribute(_RTA_METRICS, attribute(_RTAX_MTU, _U32.pack(route.mtu)))
    body += route.attributes
    flags = 0
    if len(route.hops) == 1:
        hop = route.hops[0]
        flags = hop.flags
        body += attribute(_RTA_OIF, _U32.pack(hop.index)) + _encode_gateway(route.family, hop)
    elif route.hops:
        body += attribute(_RTA_MULTIPATH, b"".join(_encode_hop(route.family, hop) for hop in route.hops))
    return _encode_route_key(route, flags=flags, scope=route.scope) + body


def _encode_hop(family: int, hop: KernelHop) -> bytes:
    gateway = _encode_gateway(family, hop)
    return _NEXT_HOP.pack(_NEXT_HOP.size + len(gateway), hop.flags, hop.weight - 1, hop.index) + gateway


def _encode_gateway(family: int, hop: KernelHop) -> bytes:
    if not hop.gateway:
        return b""
    own = _family_of(hop.gateway)
    if own == family:
        return attribute(_RTA_GATEWAY, hop.gateway)
    return attribute(_RTA_VIA, _FAMILY.pack(own) + hop.gateway)


def encode_route_key(route: KernelRoute) -> bytes:
    """Encode the attributes that identify a route, without its next hops.

    :param route: the route.
    :returns: the body of an RTM_DELROUTE message.
    """
    return _encode_route_key(route, flags=0, scope=_RT_SCOPE_NOWHERE)


def _encode_route_key(route: KernelRoute, *, flags: int, scope: int) -> bytes:
    table = route.table if route.table <= 0xFF else _RT_TABLE_UNSPEC
    body = _ROUTE.pack(
        route.family,
        route.prefix,
        route.senders_prefix,
        route.tos,
        table,
        route.protocol,
        scope,
        route.kind,
        flags,
    )
    if route.dest:
        body += attribute(_RTA_DST, route.dest)
    if route.senders:
        body += attribute(_RTA_SRC, route.senders)
    if table == _RT_TABLE_UNSPEC:
        body += attribute(_RTA_TABLE, _U32.pack(route.table))
    return body + (attribute(_RTA_PRIORITY, _U32.pack(route.metric)) if route.metric else b"")


def encode_neighbour(index: int, *, packed: bytes, mac: bytes, state: int, flags: int) -> bytes:
    """Encode an entry of the neighbour table.

    :param index: the link.
    :param packed: the neighbour's address.
    :param mac: its hardware address; empty if it is not known.
    :param state: NUD_* bits.
    :param flags: NTF_* bits.
    :returns: the body of an RTM_NEWNEIGH message.
    """
    body = _NEIGHBOUR.pack(_family_of(packed), index, state, flags, 0) + attribute(_NDA_DST, packed)
    return body + (attribute(_NDA_LLADDR, mac) if mac else b"")


def _family_of(packed: bytes) -> int:
    if len(packed) not in _FAMILIES:
        raise ValueError(f"address of {len(packed)} bytes")
    return _FAMILIES[len(packed)]


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) < layout.size:
        raise ValueError(f"{len(data)} bytes where {layout.size} are due")
    return layout.unpack_from(data)

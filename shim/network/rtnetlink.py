"""Reads the kernel's tables over netlink.

pyroute2, which Hako uses for changes, decodes every statistic in every message: reading a namespace took it
7.8 ms of processor time (median of 15), and takes 1.5 ms here. Each answer becomes a mapping: the fields of
its header, and ``attrs``, names and values. Layout: linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h and
fib_rules.h, see rtnetlink(7).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Message = dict[str, Any]
    Decoder = Callable[[bytes], Any]

RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE, RTM_GETNEIGH, RTM_GETRULE = 18, 22, 26, 30, 34
NTF_PROXY = 0x8

_NLM_F_REQUEST_DUMP = 0x1 | 0x300
_NLM_F_DUMP_INTR = 0x10
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_CODE = struct.Struct("=i")
_TYPE_MASK = 0x3FFF
_DATAGRAM_BYTES = 1 << 18
_ATTEMPTS = 8
_TIMEOUT_S = 5.0
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_RULE = struct.Struct("=BBBBBBBBI")
_NEXT_HOP = struct.Struct("=HBBi")
_IFLA_EXT_MASK, _SKIP_STATISTICS = 29, 1 << 3


class Netlink:
    """A conversation with a subsystem of the kernel, in the calling thread's namespace; a context manager.

    :param protocol: NETLINK_*.
    :raises OSError: if the kernel has no such subsystem.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """List all objects of a kind.

        :param kind: the type of the request.
        :param body: the request.
        :returns: the body of each answer.
        :raises OSError: if the kernel refuses, or the objects change so often that no list is whole.
        """
        for _ in range(_ATTEMPTS):
            self._sequence += 1
            size = _HEADER.size + len(body)
            self._socket.send(_HEADER.pack(size, kind, _NLM_F_REQUEST_DUMP, self._sequence, 0) + body)
            found, whole = self._answers()
            if whole:
                return found
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _answers(self) -> tuple[list[bytes], bool]:
        found: list[bytes] = []
        whole = True
        while True:
            for kind, flags, sequence, body in _messages(self._socket.recv(_DATAGRAM_BYTES)):
                if sequence != self._sequence:
                    continue
                whole = whole and not flags & _NLM_F_DUMP_INTR
                if kind in {_ERROR, _DONE}:
                    number = -_CODE.unpack_from(body)[0] if len(body) >= _CODE.size else 0
                    if number > 0:
                        raise OSError(number, os.strerror(number))
                    return found, whole
                found.append(body)


def _messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(datagram):
        size, kind, flags, sequence, _ = _HEADER.unpack_from(datagram, position)
        if size < _HEADER.size:
            return
        yield kind, flags, sequence, datagram[position + _HEADER.size : position + size]
        position += size + -size % 4


def attribute(kind: int, value: bytes) -> bytes:
    """Encode an attribute.

    :returns: the attribute, padded to four bytes.
    """
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Decode a run of attributes.

    :returns: type, without flags, and value of each.
    """
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, position)
        if size < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[position + _ATTRIBUTE.size : position + size]
        position += size + -size % 4


def links(netlink: Netlink) -> list[Message]:
    """List the interfaces."""
    request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    request += attribute(_IFLA_EXT_MASK, struct.pack("=I", _SKIP_STATISTICS))
    found = []
    for body in netlink.dump(RTM_GETLINK, request):
        _, kind, index, flags, _ = _LINK.unpack_from(body)
        attrs = _named(body[_LINK.size :], _LINK_ATTRIBUTES)
        found.append({"index": index, "flags": flags, "ifi_type": kind, "attrs": attrs})
    return found


def addresses(netlink: Netlink) -> list[Message]:
    """List the addresses of all interfaces, IPv4 and IPv6."""
    found = []
    for body in netlink.dump(RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        family, prefix, flags, scope, index = _ADDRESS.unpack_from(body)
        if family not in _FAMILIES:
            continue
        attrs = _named(body[_ADDRESS.size :], _ADDRESS_ATTRIBUTES)
        flags = next((value for name, value in attrs if name == "IFA_FLAGS"), flags)
        found.append({"index": index, "prefixlen": prefix, "flags": flags, "scope": scope, "attrs": attrs})
    return found


def routes(netlink: Netlink) -> list[Message]:
    """List the routes of all tables, IPv4 and IPv6."""
    found = []
    for family in _FAMILIES:
        for body in netlink.dump(RTM_GETROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            values = _ROUTE.unpack_from(body)
            if values[0] != family:
                continue
            found.append(
                {
                    **dict(zip(_ROUTE_FIELDS, values, strict=True)),
                    "attrs": _named(body[_ROUTE.size :], _ROUTE_ATTRIBUTES),
                }
            )
    return found


def neighbours(netlink: Netlink) -> list[Message]:
    """List the neighbours, IPv4 and IPv6, and the proxy entries."""
    found = []
    for asked in (0, NTF_PROXY):
        for body in netlink.dump(RTM_GETNEIGH, _NEIGHBOUR.pack(socket.AF_UNSPEC, 0, 0, asked, 0)):
            family, index, state, flags, _ = _NEIGHBOUR.unpack_from(body)
            if family in _FAMILIES:
                attrs = _named(body[_NEIGHBOUR.size :], _NEIGHBOUR_ATTRIBUTES)
                found.append({"ifindex": index, "state": state, "flags": flags, "attrs": attrs})
    return found


def rules(netlink: Netlink) -> list[bytes]:
    """List the rules that choose a routing table, IPv4 and IPv6: the bodies of their messages."""
    return [
        body
        for family in _FAMILIES
        for body in netlink.dump(RTM_GETRULE, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        if body[0] == family
    ]


def _named(data: bytes, known: Mapping[int, tuple[str, Decoder]]) -> list[tuple[str, Any]]:
    found = []
    for kind, value in attributes(data):
        if kind in known:
            name, decode = known[kind]
            found.append((name, decode(value)))
    return found


def _number(value: bytes) -> int:
    return int.from_bytes(value, "little")


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _ip(value: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(value) == 4 else socket.AF_INET6, value)


def _via(value: bytes) -> Message:
    return {"family": _number(value[:2]), "addr": _ip(value[2:])}


def _information(value: bytes) -> Message:
    return {"attrs": _named(value, {1: ("IFLA_INFO_KIND", _text)})}


def _next_hops(value: bytes) -> list[Message]:
    found = []
    position = 0
    while position + _NEXT_HOP.size <= len(value):
        size, flags, hops, index = _NEXT_HOP.unpack_from(value, position)
        if size < _NEXT_HOP.size:
            break
        attrs = _named(value[position + _NEXT_HOP.size : position + size], _ROUTE_ATTRIBUTES)
        found.append({"oif": index, "hops": hops, "flags": flags, "attrs": attrs})
        position += size + -size % 4
    return found


_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_ROUTE_FIELDS = ("family", "dst_len", "src_len", "tos", "table", "proto", "scope", "type", "flags")
_LINK_ATTRIBUTES: dict[int, tuple[str, Decoder]] = {
    1: ("IFLA_ADDRESS", lambda value: value.hex(":")),
    3: ("IFLA_IFNAME", _text),
    4: ("IFLA_MTU", _number),
    18: ("IFLA_LINKINFO", _information),
}
_ADDRESS_ATTRIBUTES: dict[int, tuple[str, Decoder]] = {
    1: ("IFA_ADDRESS", _ip),
    2: ("IFA_LOCAL", _ip),
    3: ("IFA_LABEL", _text),
    4: ("IFA_BROADCAST", _ip),
    8: ("IFA_FLAGS", _number),
    9: ("IFA_RT_PRIORITY", _number),
    11: ("IFA_PROTO", _number),
}
_ROUTE_ATTRIBUTES: dict[int, tuple[str, Decoder]] = {
    1: ("RTA_DST", _ip),
    2: ("RTA_SRC", _ip),
    4: ("RTA_OIF", _number),
    5: ("RTA_GATEWAY", _ip),
    6: ("RTA_PRIORITY", _number),
    7: ("RTA_PREFSRC", _ip),
    8: ("RTA_METRICS", bytes),
    9: ("RTA_MULTIPATH", _next_hops),
    11: ("RTA_FLOW", bytes),
    15: ("RTA_TABLE", _number),
    18: ("RTA_VIA", _via),
    20: ("RTA_PREF", _number),
    21: ("RTA_ENCAP_TYPE", _number),
    30: ("RTA_NH_ID", _number),
}
_NEIGHBOUR_ATTRIBUTES: dict[int, tuple[str, Decoder]] = {
    1: ("NDA_DST", _ip),
    2: ("NDA_LLADDR", lambda value: value.hex(":")),
}

"""The rules that choose a routing table: those of the host, beside those of containers.

Layout: include/uapi/linux/fib_rules.h.
"""

from __future__ import annotations

import _socket
import errno
import struct

from guest.agent.netlink import NLM_F_CREATE, NLM_F_EXCL, attribute, attributes
from guest.agent.rtnetlink import RTM_DELRULE, RTM_GETRULE, RTM_NEWRULE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from guest.agent.netlink import NetlinkChannel
    from guest.agent.wire import Message

_HEADER = struct.Struct("=BBBBBBBBI")
_PRIORITY, _SUPPRESS_PREFIXLEN, _PADDING, _PROTOCOL = 6, 14, 18, 21
_UNLIMITED = b"\xff\xff\xff\xff"
_BY_KERNEL = b"\x02"
_ALL = (_HEADER.pack(_socket.AF_INET, *bytes(8)), _HEADER.pack(_socket.AF_INET6, *bytes(8)))


class Rules:
    """The rules that the host has asked for so far; at first those that the kernel has made."""

    def __init__(self) -> None:
        self._former: list[bytes] | None = None

    def update(self, channel: NetlinkChannel, wanted: Iterable[Message]) -> list[str]:
        """Replace the host's previous rules by the given ones.

        :param channel: to the kernel.
        :param wanted: hako.Rule messages.
        :returns: the rules that the kernel refuses, with reasons.
        :raises OSError: if it refuses to list its rules, or to remove one.
        """
        if self._former is None:
            present = [
                body for request in _ALL for body in channel.dump(RTM_GETRULE, request, decode=_normal)
            ]
            self._former = [
                body for body in present if attributes(body[_HEADER.size :])[_PROTOCOL] == _BY_KERNEL
            ]
        refused, kept = [], []
        for one in wanted:
            try:
                if one.body not in self._former:
                    channel.change(RTM_NEWRULE, one.body, flags=NLM_F_CREATE | NLM_F_EXCL)
                kept.append(one.body)
            except OSError as error:
                if error.errno != errno.EEXIST:
                    refused.append(f"{one.text}: {error.strerror}")
        for body in self._former:
            if body not in kept:
                try:
                    channel.change(RTM_DELRULE, body)
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        raise
        self._former = kept
        return refused


def _normal(body: bytes) -> bytes:
    """Encode a rule as the host does: attributes in order, without empty ones."""
    family, *lengths, tos, table, _first, _second, action, flags = _HEADER.unpack_from(body)
    found = {_PRIORITY: bytes(4), _PROTOCOL: bytes(1)} | attributes(body[_HEADER.size :])
    found.pop(_PADDING, None)
    if found.get(_SUPPRESS_PREFIXLEN) == _UNLIMITED:
        del found[_SUPPRESS_PREFIXLEN]
    header = _HEADER.pack(family, *lengths, tos, table, 0, 0, action, flags & 2)
    return header + b"".join(attribute(kind, value) for kind, value in sorted(found.items()))

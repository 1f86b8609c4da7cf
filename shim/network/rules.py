"""The rules that choose a routing table: finds those that were set on purpose, and describes them.

The guest gets them exactly as the kernel wrote them, because they identify interfaces by name.
Pure. Layout: linux/fib_rules.h; the words are those of ip-rule(8).
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from shim.network.plan import Rule
from shim.network.rtnetlink import attribute, attributes

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADER = struct.Struct("=BBBBBBBBI")
_INVERT = 0x2
_ACTIONS = {1: "lookup", 2: "goto", 3: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit"}
_TABLES = {253: "default", 254: "main", 255: "local"}
_DST, _SRC, _IIFNAME, _GOTO, _PRIORITY, _FWMARK, _TABLE, _FWMASK, _OIFNAME = 1, 2, 3, 4, 6, 10, 15, 16, 17
_SUPPRESS_PREFIXLEN, _PROTOCOL, _PADDING, _L3MDEV = 14, 21, 18, 19
_SPORT_MASK, _DPORT_MASK = 28, 29
_UNLIMITED = b"\xff\xff\xff\xff"
_WHOLE_PORT = b"\xff\xff"
_KNOWN = frozenset({1, 2, 3, 4, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24})
"""The attributes that every kernel since 4.17 knows. A kernel ignores unknown attributes."""
_KERNEL = b"\x02"
_FIRST = (
    (socket.AF_INET, 0, 255),
    (socket.AF_INET, 32766, 254),
    (socket.AF_INET, 32767, 253),
    (socket.AF_INET6, 0, 255),
    (socket.AF_INET6, 32766, 254),
)
"""Family, priority and table of the rules that a namespace begins with."""


def decode_rules(bodies: Iterable[bytes]) -> tuple[tuple[Rule, ...] | None, tuple[str, ...]]:
    """Choose the rules for the guest.

    :param bodies: the bodies of the kernel's messages, in order.
    :returns: the rules, or None if they are those of a new namespace; and a line for each rule that the guest
        cannot have.
    """
    rules: list[Rule] = []
    unserved: list[str] = []
    for body in bodies:
        found = {_PRIORITY: bytes(4), _PROTOCOL: bytes(1)}
        found |= {kind: value for kind, value in attributes(body[_HEADER.size :]) if _says(kind, value)}
        rule = Rule(body=_normal(body, found), text=_text(body, found))
        if _L3MDEV in found or not found.keys() <= _KNOWN:
            unserved.append(f"{rule.text}: the guest's kernel does not know one of its attributes")
        else:
            rules.append(rule)
    usual = {rule.body for rule in USUAL} == {rule.body for rule in rules}
    return None if usual else tuple(rules), tuple(unserved)


def _says(kind: int, value: bytes) -> bool:
    if kind == _PADDING or (kind == _SUPPRESS_PREFIXLEN and value == _UNLIMITED):
        return False
    return not (kind in {_SPORT_MASK, _DPORT_MASK} and value == _WHOLE_PORT)


def _normal(body: bytes, found: dict[int, bytes]) -> bytes:
    family, *lengths, tos, table, _, _, action, flags = _HEADER.unpack_from(body)
    # The other flags describe the rule's state in this kernel.
    header = _HEADER.pack(family, *lengths, tos, table, 0, 0, action, flags & _INVERT)
    return header + b"".join(attribute(kind, value) for kind, value in sorted(found.items()))


def _usual(family: int, priority: int, table: int) -> Rule:
    found = {
        _PRIORITY: priority.to_bytes(4, "little"),
        _TABLE: table.to_bytes(4, "little"),
        _PROTOCOL: _KERNEL,
    }
    body = _normal(_HEADER.pack(family, 0, 0, 0, table, 0, 0, 1, 0), found)
    return Rule(body=body, text=_text(body, found))


def _table(body: bytes, found: dict[int, bytes]) -> int:
    return _number(found[_TABLE]) if _TABLE in found else body[4]


def _text(body: bytes, found: dict[int, bytes]) -> str:
    _, to_bits, from_bits, *_, action, flags = _HEADER.unpack_from(body)
    words = [f"rule {_number(found.get(_PRIORITY))}:"]
    if flags & _INVERT:
        words.append("not")
    words.append(f"from {_prefix(found.get(_SRC), from_bits)}")
    if _DST in found:
        words.append(f"to {_prefix(found[_DST], to_bits)}")
    words += [
        f"{word} {found[kind].rstrip(bytes(1)).decode(errors='replace')}"
        for kind, word in ((_IIFNAME, "iif"), (_OIFNAME, "oif"))
        if kind in found
    ]
    if _FWMARK in found or _FWMASK in found:
        words.append(f"fwmark {_number(found.get(_FWMARK)):#x}/{_number(found.get(_FWMASK)):#x}")
    words.append(_ACTIONS.get(action, f"action {action}"))
    if _ACTIONS.get(action) == "lookup":
        number = _table(body, found)
        words.append("[l3mdev-table]" if _L3MDEV in found else _TABLES.get(number, str(number)))
    elif _GOTO in found:
        words.append(str(_number(found[_GOTO])))
    return " ".join(words)


def _prefix(value: bytes | None, bits: int) -> str:
    if not value:
        return "all"
    family = socket.AF_INET if len(value) == 4 else socket.AF_INET6
    return f"{socket.inet_ntop(family, value)}/{bits}"


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "little")


USUAL = tuple(_usual(*each) for each in _FIRST)
"""The rules that a namespace begins with."""

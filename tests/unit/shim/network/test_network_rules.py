"""The guest gets the rules that choose a routing table, if somebody has changed them."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from shim.network.rtnetlink import attribute
from shim.network.rules import USUAL, decode_rules

V4, V6 = 2, 10


def rule(family: int, *, action: int = 1, flags: int = 0, table: int = 254, **attrs: bytes) -> bytes:
    kinds = {"iif": 3, "priority": 6, "mark": 10, "mask": 16, "table": 15, "by": 21, "dscp": 25, "l3mdev": 19}
    encoded = b"".join(attribute(kinds[name], value) for name, value in attrs.items())
    return struct.pack("=BBBBBBBBI", family, 0, 0, 0, table, 0, 0, action, flags) + encoded


def number(value: int) -> bytes:
    return struct.pack("=I", value)


FIRST_RULES = [
    rule(family, table=table, priority=number(priority), by=b"\2")
    + attribute(15, number(table))
    + attribute(14, b"\xff" * 4)
    for family, priority, table in (
        (V4, 0, 255),
        (V4, 32766, 254),
        (V4, 32767, 253),
        (V6, 0, 255),
        (V6, 32766, 254),
    )
]


def test_the_rules_of_a_new_namespace_are_not_sent() -> None:
    assert decode_rules(FIRST_RULES) == (None, ())


def test_rules_are_copied_unchanged_and_in_order() -> None:
    # The kernel sets a flag because the interface does not exist.
    own = rule(V4, flags=2 | 8, iif=b"eth0\0", mark=number(1), mask=number(255), priority=number(10))

    taken, unserved = decode_rules([*FIRST_RULES, own])

    assert taken is not None
    assert taken[:5] == USUAL
    assert taken[5].text == "rule 10: not from all iif eth0 fwmark 0x1/0xff lookup main"
    assert taken[5].body == rule(
        V4, flags=2, iif=b"eth0\0", priority=number(10), mark=number(1), mask=number(255), by=b"\0"
    )
    assert unserved == ()


def test_a_usual_rule_that_was_removed_is_missing_in_the_guest_too() -> None:
    taken, _ = decode_rules(FIRST_RULES[1:])

    assert taken == USUAL[1:]


@pytest.mark.parametrize("attrs", [{"dscp": b"\1"}, {"l3mdev": b"\1"}], ids=str)
def test_a_rule_that_the_guests_kernel_would_misunderstand_is_named(attrs: dict[str, Any]) -> None:
    taken, [line] = decode_rules([*FIRST_RULES, rule(V4, priority=number(10), **attrs)])

    assert taken is None
    assert line.startswith("rule 10: from all lookup ")

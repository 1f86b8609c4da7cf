"""The lowest free slot is taken first, and a released slot is free again."""

from __future__ import annotations

import pytest

from hypervisor.errors import HotplugError
from hypervisor.slots import BRIDGE, PORT, Slot, Slots


def slots_of(*buses: str, numbers: range = BRIDGE) -> Slots:
    return Slots(buses, numbers=numbers, kind="slots", remedy="unplug a device first")


def test_the_first_free_slot_is_taken() -> None:
    slots = slots_of("a", "b")
    first, second = slots.take(), slots.take()
    assert (first, second) == (Slot("a", 1), Slot("a", 2))
    slots.give_back(first)
    assert slots.take() == first


def test_every_slot_of_every_bus_is_taken_only_once() -> None:
    slots = slots_of("a", "b")
    taken = {slots.take() for _ in range(62)}
    assert len(taken) == 62
    assert {slot.number for slot in taken} == set(range(1, 32))
    with pytest.raises(HotplugError, match="all 62 slots"):
        slots.take()
    slots.give_back(Slot("b", 7))
    assert slots.take() == Slot("b", 7)


def test_a_slot_is_released_only_once() -> None:
    slots = slots_of("a")
    slot = slots.take()
    slots.give_back(slot)
    with pytest.raises(KeyError):
        slots.give_back(slot)


def test_a_root_port_has_one_slot() -> None:
    slots = slots_of("a", "b", numbers=PORT)
    assert [slots.take(), slots.take()] == [Slot("a", 0), Slot("b", 0)]
    with pytest.raises(HotplugError, match="all 2 slots of the virtual machine are taken; unplug"):
        slots.take()

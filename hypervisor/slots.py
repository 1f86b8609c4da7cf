"""The places in which devices are plugged: given out lowest first, and again once they are free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.errors import NoSlotError

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBERS = range(1, 32)
"""A PCI bus has 32 slots (PCI Local Bus 3.0, 3.2.2.3.2); slot 0 of a bridge belongs to its own controller."""


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """One place for a device.

    :param bus: the QEMU id of the bus.
    :param number: the slot on it.
    """

    bus: str
    number: int


class Slots:
    """The slots of one virtual machine.

    :param buses: the QEMU ids of the buses that devices are plugged into, the one to fill first in front.
    """

    def __init__(self, buses: Sequence[str]) -> None:
        self._all = [Slot(bus, number) for bus in buses for number in _NUMBERS]
        self._taken: set[Slot] = set()

    def take(self) -> Slot:
        """Take the first free slot.

        :raises NoSlotError: if all are taken.
        """
        for slot in self._all:
            if slot not in self._taken:
                self._taken.add(slot)
                return slot
        raise NoSlotError(
            f"plug: all {len(self._all)} slots of the virtual machine are taken; unplug a device first"
        )

    def give_back(self, slot: Slot) -> None:
        """Make a slot free again.

        :param slot: one that ``take`` returned.
        :raises KeyError: if it is free already, which is a defect of the caller.
        """
        self._taken.remove(slot)

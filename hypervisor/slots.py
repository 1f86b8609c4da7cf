"""The slots for devices; the lowest free one is taken first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.errors import NoSlotError

if TYPE_CHECKING:
    from collections.abc import Sequence

BRIDGE = range(1, 32)
"""The slots of a bridge: 32 (PCI Local Bus 3.0, 3.2.2.3.2), except the first, which its controller has."""

PORT = range(1)
"""The slots of a PCIe root port."""


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A slot for one device.

    :param bus: the QEMU id of the bus.
    :param number: the slot on it.
    """

    bus: str
    number: int


class Slots:
    """A virtual machine's slots of one kind.

    :param buses: the QEMU ids of the buses that devices are plugged into, the one to fill first in front.
    :param numbers: the slots of each bus.
    :param kind: their name in an error.
    :param remedy: what to do if none is free.
    """

    def __init__(self, buses: Sequence[str], *, numbers: range, kind: str, remedy: str) -> None:
        self._all = [Slot(bus, number) for bus in buses for number in numbers]
        self._kind = kind
        self._remedy = remedy
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
            f"plug: all {len(self._all)} {self._kind} of the virtual machine are taken; {self._remedy}"
        )

    def give_back(self, slot: Slot) -> None:
        """Make a slot free again.

        :param slot: one that ``take`` returned.
        :raises KeyError: if it is free already, which is a defect of the caller.
        """
        self._taken.remove(slot)

"""A guest's answer when a processor or a memory module is added or removed (ACPI 6.5, 6.3.5, _OST)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypervisor.qmp import EventStream

EVENTS = ("ACPI_DEVICE_OST", "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
"""The events that :func:`answer` reads."""

_EJECT_REQUEST = frozenset({0x3, 0x103})
_SUCCESS = 0x00
_EJECT_IN_PROGRESS = 0x84


@dataclass(frozen=True, slots=True)
class AcpiSlot:
    """A device's slot in ACPI's count, and QEMU's name of the device.

    :param kind: ``CPU`` or ``DIMM``.
    :param number: counted from 0.
    :param device: the device's id.
    """

    kind: str
    number: int
    device: str


async def answer(slot: AcpiSlot, events: EventStream, *, leaving: bool, timeout_s: float) -> str:
    """Wait for the guest's answer about one device.

    :param slot: the device.
    :param events: the events in ``EVENTS``, collected from before the request on.
    :param leaving: whether the guest was asked to release the device, not to add it.
    :param timeout_s: how long it may take, in seconds.
    :returns: what went wrong; empty on success.
    :raises QmpError: if QEMU ends before the answer.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                event = await events.next()
                if event.name == "ACPI_DEVICE_OST":
                    info = event.data.get("info", {})
                    place = info.get("slot-type"), info.get("slot")
                    status = info.get("status")
                    ours = place == (slot.kind, str(slot.number))
                    if not ours or (info.get("source") in _EJECT_REQUEST) is not leaving:
                        continue
                    if status == _SUCCESS:
                        return ""
                    if status != _EJECT_IN_PROGRESS:
                        return f"ACPI status {status}"
                elif leaving and event.data.get("device") == slot.device:
                    # Under TCG, QEMU never sends it for a processor, which stays half alive (seen on 7.2).
                    return "" if event.name == "DEVICE_DELETED" else "it says so"
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"

"""QEMU's events carry a guest's answers about processors and memory modules."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from hypervisor import acpi
from hypervisor.qmp import Event, EventStream

SLOT = acpi.AcpiSlot("CPU", 3, "vcpu3")
CHECK, EJECT, OS_EJECT = 0x1, 0x3, 0x103
DONE, FAILED, BUSY, UNDER_WAY = 0x0, 0x1, 0x82, 0x84


class Events:
    """A fixed list of events."""

    def __init__(self, *events: Event) -> None:
        self._events = list(events)

    async def next(self) -> Event:
        if not self._events:
            await asyncio.get_running_loop().create_future()
        return self._events.pop(0)


def ost(source: int, status: int, *, slot: str = "3", kind: str = "CPU") -> Event:
    info = {"source": source, "status": status, "slot": slot, "slot-type": kind}
    return Event("ACPI_DEVICE_OST", {"info": info})


def deleted(device: str) -> Event:
    return Event("DEVICE_DELETED", {"device": device, "path": f"/machine/peripheral/{device}"})


async def answer(*events: Event, leaving: bool) -> str:
    return await acpi.answer(SLOT, cast("EventStream", Events(*events)), leaving=leaving, timeout_s=0.01)


SILENCE = "no answer within 0.01 s"


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([ost(CHECK, DONE)], ""),
        ([ost(CHECK, FAILED)], "ACPI status 1"),
        ([ost(CHECK, DONE, slot="2")], SILENCE),
        ([ost(CHECK, DONE, kind="DIMM")], SILENCE),
        ([ost(EJECT, DONE)], SILENCE),
        ([deleted("vcpu3")], SILENCE),
        ([], SILENCE),
    ],
)
async def test_an_addition_is_done_when_the_guest_confirms_that_slot(
    events: list[Event], problem: str
) -> None:
    assert await answer(*events, leaving=False) == problem


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([ost(EJECT, UNDER_WAY), ost(EJECT, DONE)], ""),
        ([ost(OS_EJECT, DONE)], ""),
        ([ost(EJECT, UNDER_WAY), deleted("vcpu3")], ""),
        ([ost(EJECT, UNDER_WAY), ost(EJECT, BUSY)], "ACPI status 130"),
        ([Event("DEVICE_UNPLUG_GUEST_ERROR", {"device": "vcpu3"})], "it says so"),
        ([Event("DEVICE_UNPLUG_GUEST_ERROR", {"device": "vcpu2"})], SILENCE),
        ([Event("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu3/lapic"})], SILENCE),
        ([deleted("vcpu2"), ost(CHECK, DONE)], SILENCE),
        ([ost(EJECT, UNDER_WAY)], SILENCE),
    ],
)
async def test_a_removal_is_done_when_the_guest_or_qemu_confirms_it(
    events: list[Event], problem: str
) -> None:
    assert await answer(*events, leaving=True) == problem

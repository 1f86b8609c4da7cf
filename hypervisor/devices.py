"""The devices that are plugged into a running virtual machine: each has a slot, and a backend on the host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from hypervisor.errors import HotplugError, QmpError
from hypervisor.qmp import CommandRefusedError
from hypervisor.slots import BRIDGE, PORT, Slot, Slots

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hypervisor.qmp import Event, QmpSession

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_PERIPHERALS = "/machine/peripheral"
"""Where QEMU's object model keeps the devices that have an id."""

_EVENTS = ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "BLOCK_IO_ERROR")
_NOT_FOUND = "DeviceNotFound"
_ASKED_ALREADY = "in the process of unplug"
_ASK_AGAIN_S = 1.0
_FUNCTION_BITS = 3
"""The bits of a PCI device's address below its slot number."""


@dataclass(frozen=True, slots=True)
class Command:
    """A QMP command.

    :param name: for example ``netdev_add``.
    :param arguments: its arguments, of the types of QEMU's schema: since 9.2 it takes no others.
    """

    name: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A device as QEMU wants it described.

    :param id: its id.
    :param driver: QEMU's name of the device model.
    :param properties: its properties, without the id and the slot.
    :param backend: the commands that make the host's side of it, in order.
    :param undo: the commands that remove the host's side again, in order.
    :param needs_port: whether it needs its own PCIe root port, not a slot behind a bridge.
    :param add_timeout_s: how long QEMU may take to add it, in seconds; ``None``: as for any command.
    """

    id: str
    driver: str
    properties: Mapping[str, object]
    backend: Sequence[Command]
    undo: Sequence[Command]
    needs_port: bool = False
    add_timeout_s: float | None = None


@dataclass(slots=True)
class _Plugged:
    description: Description
    slot: Slot
    complete: bool = False
    asked: bool = False
    """Whether QEMU was told to remove it, so that it will report the end."""
    gone: asyncio.Future[None] | None = None
    """Set while a task waits for the guest to release the device."""
    reported: set[str] = field(default_factory=set)
    """The failures already logged: a guest that tries again and again must not flood the log."""


class Devices:
    """The devices plugged into one virtual machine.

    :param session: the control connection.
    :param buses: the QEMU ids of the bridges to plug into.
    :param ports: the QEMU ids of the PCIe root ports.
    """

    def __init__(self, session: QmpSession, *, buses: Sequence[str], ports: Sequence[str]) -> None:
        self._session = session
        self._slots = Slots(buses, numbers=BRIDGE, kind="slots", remedy="unplug a device first")
        self._ports = Slots(
            ports, numbers=PORT, kind="PCIe root ports", remedy="raise root_ports in the configuration"
        )
        self._plugged: dict[str, _Plugged] = {}

    async def watch(self) -> None:
        """Handle QEMU's reports about devices until the session ends.

        When QEMU says that a device is gone, the device is forgotten, its slot freed and its backend removed.
        That may be long after the caller of :meth:`unplug` gave up.
        """
        with self._session.events(*_EVENTS) as events, contextlib.suppress(QmpError):
            while True:
                await self._heed(await events.next())

    async def plug(self, description: Description) -> str:
        """Add a device and find its PCI path; the guest learns of it at once.

        :param description: the device. Its backend is removed again if the device cannot be added.
        :returns: its PCI path in the guest.
        :raises NoSlotError: if all slots are taken.
        :raises HotplugError: if a device with this id exists, or QEMU refuses the device or its backend.
        :raises QmpError: if QEMU does not answer.
        """
        return await self._plug(description, lambda: pci_path(self._session, description.id))

    async def attach(self, description: Description) -> None:
        """Add a device that the guest finds without being told; otherwise like :meth:`plug`.

        :param description: the device. Its backend is removed again if the device cannot be added.
        :raises NoSlotError: if all slots are taken.
        :raises HotplugError: if a device with this id exists, or QEMU refuses the device or its backend.
        :raises QmpError: if QEMU does not answer.
        """
        await self._plug(description, _nothing)

    async def _plug(self, description: Description, find: Callable[[], Awaitable[_T]]) -> _T:
        name = description.id
        if name in self._plugged:
            raise HotplugError(f"plug: {name}: a device with this id exists already; unplug it first")
        plugged = self._plugged[name] = _Plugged(description, self._slots_for(description).take())
        try:
            for command in description.backend:
                await self._session.ask(dict, command.name, command.arguments)
            patience = {} if description.add_timeout_s is None else {"timeout_s": description.add_timeout_s}
            await self._session.ask(dict, "device_add", _placed(description, plugged.slot), **patience)
            found = await find()
        except BaseException as error:
            await self._abandon(plugged)
            if isinstance(error, CommandRefusedError):
                raise HotplugError(f"plug: {name}: {error}") from error
            raise
        plugged.complete = True
        return found

    async def unplug(self, name: str, *, timeout_s: float) -> None:
        """Ask the guest to release a device; return when QEMU has removed the device and its backend.

        :param name: the device's id.
        :param timeout_s: the longest this may take, in seconds.
        :raises HotplugError: if there is no such device, the guest refuses, or it does not answer in time.
            The device stays. If the guest releases it later, its slot is free again.
        :raises QmpError: if QEMU does not answer.
        """
        plugged = self._plugged.get(name)
        if plugged is None or not plugged.complete:
            raise HotplugError(f"unplug: {name}: no such device is plugged")
        gone = plugged.gone = plugged.gone or asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                while not gone.done():
                    await self._ask_to_leave(plugged)
                    # A booting guest clears requests that it never saw, and no event tells when.
                    await asyncio.wait([gone], timeout=_ASK_AGAIN_S)
                gone.result()
        except TimeoutError:
            raise HotplugError(
                f"unplug: {name}: the guest did not let go of it within {timeout_s:g} s; "
                "end what uses it there and try again"
            ) from None

    def _slots_for(self, description: Description) -> Slots:
        return self._ports if description.needs_port else self._slots

    def __contains__(self, name: str) -> bool:
        """Tell whether a device is plugged."""
        return name in self._plugged and self._plugged[name].complete

    async def _heed(self, event: Event) -> None:
        if event.name == "BLOCK_IO_ERROR":
            self._report(event.data)
            return
        # Devices without an id, such as parts of other devices, do not matter here.
        plugged = self._plugged.get(str(event.data.get("device")))
        if plugged is None:
            return
        if event.name == "DEVICE_DELETED":
            await self._forget(plugged)
        elif plugged.gone is not None:
            refusal = (
                f"unplug: {plugged.description.id}: the guest refused; end what uses it there and try again"
            )
            gone, plugged.gone = plugged.gone, None
            gone.set_exception(HotplugError(refusal))
            gone.exception()  # marks it as retrieved, in case no task waits for it

    def _report(self, data: Mapping[str, object]) -> None:
        for name, plugged in self._plugged.items():
            drive = plugged.description.properties.get("drive")
            if drive is not None and drive == data.get("node-name"):
                failure = f"{data.get('operation')}: {data.get('reason')}"
                if failure not in plugged.reported:
                    plugged.reported.add(failure)
                    log.error("disk %s: %s; the guest was given an I/O error", name, failure)

    async def _ask_to_leave(self, plugged: _Plugged) -> None:
        name = plugged.description.id
        asked_before, plugged.asked = plugged.asked, True
        try:
            await self._session.ask(dict, "device_del", {"id": name})
        except CommandRefusedError as error:
            if error.kind == _NOT_FOUND:
                # The guest has released it, and QEMU will report its end. If the guest ejected it by itself,
                # there is no report.
                if not asked_before:
                    await self._forget(plugged)
            elif _ASKED_ALREADY not in str(error):
                raise HotplugError(f"unplug: {name}: {error}") from error

    async def _abandon(self, plugged: _Plugged) -> None:
        """Undo a plug that failed or was given up; QEMU may or may not have carried out its commands."""
        try:
            await self._session.ask(dict, "device_del", {"id": plugged.description.id})
        except QmpError:
            await self._forget(plugged)
        # Otherwise the device exists, and QEMU will report when the guest has released it.

    async def _forget(self, plugged: _Plugged) -> None:
        name = plugged.description.id
        for command in plugged.description.undo:
            try:
                await self._session.ask(dict, command.name, command.arguments)
            except CommandRefusedError as error:
                if plugged.complete:  # otherwise it may never have been made
                    log.warning("unplug: %s: something stays behind: %s", name, error)
            except QmpError:  # without QEMU, there is nothing left to remove
                break
        if self._plugged.get(name) is plugged:
            del self._plugged[name]
            self._slots_for(plugged.description).give_back(plugged.slot)
        if plugged.gone is not None and not plugged.gone.done():
            plugged.gone.set_result(None)


async def _nothing() -> None:
    pass


async def pci_path(session: QmpSession, name: str) -> str:
    """Find where the guest sees a device.

    :param session: the control connection.
    :param name: the device's id.
    :returns: the slot numbers from the root bus to the device, each two hexadecimal digits, with slashes
        between them, as Kata's agent protocol writes a PCI path.
    :raises QmpError: if there is no such device.
    """
    numbers: list[str] = []
    path = f"{_PERIPHERALS}/{name}"
    while path.startswith(_PERIPHERALS):
        address = await session.ask(int, "qom-get", {"path": path, "property": "addr"})
        numbers.insert(0, f"{address >> _FUNCTION_BITS:02x}")
        bus = await session.ask(str, "qom-get", {"path": path, "property": "parent_bus"})
        path = bus.rpartition("/")[0]
    return "/".join(numbers)


def socket_chardev(name: str, fd_name: str) -> Command:
    """Build the command by which QEMU uses a connected socket.

    :param name: its new name.
    :param fd_name: the name under which QEMU holds the socket.
    """
    backend = {"addr": {"type": "fd", "data": {"str": fd_name}}, "server": False}
    return Command("chardev-add", {"id": name, "backend": {"type": "socket", "data": backend}})


def _placed(description: Description, slot: Slot) -> dict[str, object]:
    # The slot is hexadecimal text. QEMU takes a number only since 9.2, and as slot and function in one.
    place = {"id": description.id, "bus": slot.bus, "addr": f"{slot.number:x}"}
    return {"driver": description.driver, **description.properties, **place}

"""The virtual CPUs of a running virtual machine: added and removed one by one, newest first."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypervisor import acpi
from hypervisor.errors import QmpError, ResizeError, ResizeRefusedError

if TYPE_CHECKING:
    from hypervisor.qmp import EventStream, QmpSession

_ANSWER_S = 20.0
"""How long the guest may take for one virtual CPU. Under emulation, all others stop during that time."""

_SAFE_MAJOR = 10
"""The first QEMU that was seen to survive the removal of a virtual CPU under emulation."""

_STATE_S = 1.0
_PREFIX = "vcpu"
_PERIPHERAL = f"/machine/peripheral/{_PREFIX}"
"""Where QEMU keeps virtual CPUs that were added. Those that it started with cannot be removed."""


class Vcpus:
    """The virtual CPUs of one virtual machine.

    :param session: the control connection.
    :param pid: QEMU's process.
    :param boot: how many it started with.
    :param most: how many it can have.
    :param emulated: whether QEMU translates their instructions (TCG).
    """

    def __init__(self, session: QmpSession, *, pid: int, boot: int, most: int, emulated: bool) -> None:
        self._session = session
        self._pid = pid
        self._boot = boot
        self._most = most
        self._emulated = emulated
        self._lock = asyncio.Lock()

    async def resize(self, count: int) -> int:
        """Add or remove virtual CPUs. The guest has seen new ones then, but does not use them yet.

        :param count: the wanted number.
        :returns: the number then, by QEMU's own count; it is higher if none can be removed.
        :raises ResizeError: if the machine cannot have this number, or QEMU refuses.
        :raises ResizeRefusedError: if the guest refuses or does not answer.
        """
        if not self._boot <= count <= self._most:
            raise ResizeError(
                f"resize vcpus: {count}: the virtual machine can have {self._boot} to {self._most}; "
                "start it with others"
            )
        async with self._lock:
            try:
                with self._session.events(*acpi.EVENTS) as events:
                    await self._grow(count, events)
                    if await self._can_shrink():
                        await self._shrink(count, events)
                return await self._count()
            except QmpError as error:
                raise ResizeError(f"resize vcpus: {count}: {error}") from error

    async def pin(self, cpus: frozenset[int]) -> None:
        """Choose the host's processors for the threads that run the virtual CPUs.

        :param cpus: the processors' numbers; none for those that this process may use.
        :raises ResizeError: if the host has no such processor, or QEMU does not answer.
        """
        allowed = cpus or os.sched_getaffinity(0)
        async with self._lock:
            try:
                found = await self._session.ask(list, "query-cpus-fast")
                # Each thread once: under emulation, one may run all virtual CPUs.
                threads = list(dict.fromkeys(self._own_thread(each["thread-id"]) for each in found))
                one_each = len(threads) == len(cpus)
                for thread, cpu in zip(threads, sorted(cpus) if one_each else threads, strict=True):
                    os.sched_setaffinity(thread, {cpu} if one_each else allowed)
            except (QmpError, OSError) as error:
                raise ResizeError(f"pin vcpus: to {sorted(allowed)}: {error}") from error

    async def states(self) -> str:
        """Describe the state of each virtual CPU and how long it has run; empty if QEMU does not answer."""
        try:
            found = await self._session.ask(list, "query-cpus-fast", timeout_s=_STATE_S)
            return ", ".join(f"vCPU {each['cpu-index']} {self._state(each['thread-id'])}" for each in found)
        except (QmpError, OSError, LookupError):
            return ""

    def _state(self, tid: object) -> str:
        return thread_state(self._own_thread(tid))

    def _own_thread(self, tid: object) -> int:
        """Accept only QEMU's threads: a QEMU that its guest has taken over could name any of the host's."""
        if isinstance(tid, int):
            for task in Path(f"/proc/{self._pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
                    # Its numbers in each pid namespace, from this process's to its own: QEMU has the last.
                    if numbers(task.joinpath("status").read_text(encoding="ascii"))[-1:] == [tid]:
                        return int(task.name)
        raise QmpError(f"thread {tid!r} is not one of QEMU's")

    async def _count(self) -> int:
        return len(await self._session.ask(list, "query-cpus-fast"))

    async def _can_shrink(self) -> bool:
        """Tell whether QEMU survives the removal of a virtual CPU.

        Under emulation, 7.2 does not: it frees the translation cache with the processor, and once more when
        the memory map changes next, as it does with each plugged device. QEMU 10 survives.
        """
        if not self._emulated:
            return True
        version = await self._session.ask(dict, "query-version")
        return int(version["qemu"]["major"]) >= _SAFE_MAJOR

    async def _slots(self) -> list[dict[str, Any]]:
        """List the places for virtual CPUs in the guest's order; QEMU has the last one first."""
        slots: list[dict[str, Any]] = await self._session.ask(list, "query-hotpluggable-cpus")
        return slots[::-1]

    async def _grow(self, count: int, events: EventStream) -> None:
        slots = await self._slots()
        free = [number for number, slot in enumerate(slots) if "qom-path" not in slot]
        for number in free[: max(count - (len(slots) - len(free)), 0)]:
            place = acpi.AcpiSlot("CPU", number, f"{_PREFIX}{number}")
            arguments = {"driver": slots[number]["type"], "id": place.device, **slots[number]["props"]}
            await self._session.ask(dict, "device_add", arguments)
            if problem := await acpi.answer(place, events, leaving=False, timeout_s=_ANSWER_S):
                raise ResizeRefusedError(
                    f"resize vcpus: {place.device}: the guest did not take it ({problem}); see its console",
                    reached=await self._count(),
                )

    async def _shrink(self, count: int, events: EventStream) -> None:
        paths = [slot.get("qom-path", "") for slot in await self._slots()]
        added = [number for number, path in enumerate(paths) if path.startswith(_PERIPHERAL)]
        excess = max(sum(map(bool, paths)) - count, 0)
        for number in added[::-1][:excess]:
            place = acpi.AcpiSlot("CPU", number, f"{_PREFIX}{number}")
            await self._session.ask(dict, "device_del", {"id": place.device})
            if problem := await acpi.answer(place, events, leaving=True, timeout_s=_ANSWER_S):
                raise ResizeRefusedError(
                    f"resize vcpus: {place.device}: the guest keeps it ({problem}); free it and try again",
                    reached=await self._count(),
                )


def numbers(status: str) -> list[int]:
    """Find a thread's ids in all pid namespaces that it is in, outermost first.

    :param status: as in proc(5).
    """
    line = next((line for line in status.splitlines() if line.startswith("NSpid:")), "")
    return [int(word) for word in line.split()[1:]]


def thread_state(tid: int) -> str:
    """Describe a thread's state, and how long it has run and has waited for a processor.

    :param tid: its id.
    :raises OSError: if there is no such thread.
    """
    place = Path(f"/proc/{tid}/task/{tid}")
    state = (place / "stat").read_text(encoding="utf-8").rpartition(") ")[2][:1]
    ran, waited, *_ = ((place / "schedstat").read_text(encoding="ascii")).split()
    doing = {"R": "runs", "S": "sleeps"}.get(state, f"is in state {state}")
    return f"{doing} (ran for {int(ran) / 1e9:.1f} s, waited {int(waited) / 1e9:.1f} s for a processor)"

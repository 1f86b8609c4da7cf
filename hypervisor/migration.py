"""Saves and loads a machine by QEMU's own means. The memory is copied separately."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.errors import QmpError

if TYPE_CHECKING:
    from hypervisor.qmp import EventStream, QmpSession

IGNORE_SHARED = {
    "capabilities": [
        {"capability": "x-ignore-shared", "state": True},
        {"capability": "events", "state": True},
    ]
}
"""For ``migrate-set-capabilities``: leave out memory that another process can map."""

EVENT = "MIGRATION"


async def completed(session: QmpSession, events: EventStream) -> None:
    """Wait until QEMU has saved or loaded the machine.

    :param session: the control connection.
    :param events: the events named ``EVENT``, collected from before the command on.
    :raises QmpError: if it fails, or QEMU ends.
    """
    while True:
        status = (await events.next()).data.get("status")
        if status == "completed":
            return
        if status in {"failed", "cancelled"}:
            reply = await session.ask(dict, "query-migrate")
            raise QmpError(f"qmp: migration {status}: {reply.get('error-desc', 'no cause given')}")

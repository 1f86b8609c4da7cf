"""A machine's state is read while QEMU writes it."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from hypervisor import saving
from hypervisor.errors import QmpError
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from hypervisor.qmp import QmpSession
    from tests.unit.hypervisor.conftest import Peer

STATE = bytes(range(256)) * (1 << 14)
"""More than a socket holds."""


async def take_socket(peer: Peer) -> socket.socket:
    """Answer the commands before ``migrate``; return the socket that they hand over."""
    await peer.serve({"return": {}})
    command, [fd] = await peer.receive_fds()
    await peer.send({"return": {}, "id": command["id"]})
    handed = socket.socket(fileno=fd)
    handed.settimeout(0)
    return handed


async def test_a_state_is_read_that_is_written_before_the_answer(
    connected: tuple[QmpSession, Peer],
) -> None:
    session, peer = connected

    async def save() -> None:
        with await take_socket(peer) as handed:
            command = await peer.receive()
            await asyncio.get_running_loop().sock_sendall(handed, STATE)
        await peer.send({"return": {}, "id": command["id"]})
        await peer.send(
            {
                "event": "MIGRATION",
                "data": {"status": "completed"},
                "timestamp": {"seconds": 0, "microseconds": 0},
            }
        )

    async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as group:
        group.create_task(save())
        found = group.create_task(saving._device_state(session))
    assert found.result() == STATE


async def test_a_refusal_to_save_is_told(connected: tuple[QmpSession, Peer]) -> None:
    session, peer = connected

    async def refuse() -> None:
        with await take_socket(peer):
            command = await peer.receive()
            refusal = {"class": "GenericError", "desc": "a device cannot be saved"}
            await peer.send({"error": refusal, "id": command["id"]})

    async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as group:
        group.create_task(refuse())
        with pytest.raises(QmpError, match="a device cannot be saved"):
            await saving._device_state(session)

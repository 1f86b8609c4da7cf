"""Fixtures for tests without a virtual machine: a specification, and QEMU's side of a QMP session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor import Accelerator, Channel, VmSpec
from hypervisor.qmp import QmpSession

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., VmSpec]:
    def make(**changes: Any) -> VmSpec:
        values: dict[str, Any] = {
            "name": "sandbox-1",
            "directory": tmp_path,
            "qemu": Path("/usr/bin/qemu-system-x86_64"),
            "machine_options": "",
            "kernel": Path("/guest/vmlinux"),
            "initrd": Path("/guest/initrd"),
            "kernel_parameters": (),
            "accelerator": Accelerator.TCG,
            "vcpus": 1,
            "max_vcpus": 4,
            "memory_bytes": 512 << 20,
            "max_memory_bytes": 4 << 30,
            "share_source": tmp_path / "share",
            "virtiofsd": Path("/usr/libexec/virtiofsd"),
            "channel": Channel.VIRTIO_SERIAL,
            "vsock_daemon": None,
            "network_namespace": None,
            "root_ports": 0,
        }
        return VmSpec(**{**values, **changes})

    return make


GREETING = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}
}


class Peer:
    """QEMU's side of the connection."""

    def __init__(self, fd: int) -> None:
        self._stream = socket.socket(fileno=socket.dup(fd))
        self._stream.settimeout(0)
        self._received = bytearray()

    async def send(self, message: bytes | dict[str, Any]) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
        await asyncio.get_running_loop().sock_sendall(self._stream, data)

    async def receive(self) -> dict[str, Any]:
        # The library sends no line ends: a command ends where its JSON ends.
        while True:
            with contextlib.suppress(ValueError):
                message: dict[str, Any] = json.loads(self._received)
                self._received.clear()
                return message
            chunk = await asyncio.get_running_loop().sock_recv(self._stream, 4096)
            assert chunk, "the session hung up"
            self._received += chunk

    async def receive_fds(self) -> tuple[dict[str, Any], list[int]]:
        """Receive a command and the descriptors that came just before it."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._stream, readable.set)
        await readable.wait()
        loop.remove_reader(self._stream)
        blank, fds, _flags, _address = socket.recv_fds(self._stream, 1, 4)
        assert (blank, len(fds)) == (b" ", 1)
        return await self.receive(), fds

    async def serve(self, *answers: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Answer commands one after another; return the commands."""
        commands = []
        for answer in answers:
            query = await self.receive()
            commands.append((query["execute"], query.get("arguments", {})))
            await self.send({**answer, "id": query["id"]})
        return commands

    async def negotiate(self) -> None:
        await self.send(GREETING)
        assert (await self.receive())["execute"] == "qmp_capabilities"
        await self.send({"return": {}})

    def hang_up(self) -> None:
        self._stream.close()


@pytest.fixture
async def ends() -> AsyncIterator[tuple[QmpSession, Peer]]:
    with ExitStack() as handover:
        session = QmpSession("test", handover=handover)
        peer = Peer(session.qemu_fd)
    yield session, peer
    peer.hang_up()
    await session.close()


@pytest.fixture
async def connected(ends: tuple[QmpSession, Peer]) -> tuple[QmpSession, Peer]:
    session, peer = ends
    async with asyncio.TaskGroup() as group:
        group.create_task(peer.negotiate())
        group.create_task(session.connect())
    return session, peer

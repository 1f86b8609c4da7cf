"""A process's last output is waited for: longer for a slow guest than for a client that does not read."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from shim.sandbox import stream_copying
from shim.sandbox.host_streams import HostStreams, Stdio
from shim.sandbox.stream_copying import StreamCopier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proto.kata import agent_pb2

UNREAD = b"x" * (1 << 20)  # more than a pipe holds


class Guest:
    """The guest's ends of streams: on a signal they yield one output and end."""

    def __init__(self, said: bytes) -> None:
        self.goes_on = asyncio.Event()
        self._left = [said]

    def announce(self, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest) -> None:
        """Do nothing."""

    async def read(self, name: str) -> bytes | memoryview:  # noqa: ARG002 - there is only one output
        """Wait for the guest."""
        await self.goes_on.wait()
        return self._left.pop() if self._left else b""

    async def write(self, data: bytes) -> None:
        """Do nothing."""

    async def end_input(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    yield reader, writer
    os.close(reader)


def copier_from(guest: Guest, writer: int) -> StreamCopier:
    return StreamCopier(
        guest,
        stdio=Stdio(stdout="/out", terminal=True),
        host_streams=HostStreams(stdout=writer),
        name="box",
        heard=asyncio.Event(),
    )


async def test_a_stalled_guest_gets_more_time_than_a_client(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_copying, "DRAIN_TIMEOUT_S", 0.01)
    guest = Guest(b"last words")
    copier = copier_from(guest, pipe[1])
    async with asyncio.TaskGroup() as group:
        outputs = copier.outputs(group)
        copier.process_ended()
        draining = group.create_task(copier.drained(outputs))
        await asyncio.wait({draining}, timeout=0.1)
        assert not draining.done()
        guest.goes_on.set()
    assert draining.result()
    assert os.read(pipe[0], 100) == b"last words"


async def test_a_client_that_does_not_read_is_given_up_on(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_copying, "DRAIN_TIMEOUT_S", 0.01)
    guest = Guest(UNREAD)
    guest.goes_on.set()
    copier = copier_from(guest, pipe[1])
    async with asyncio.TaskGroup() as group:
        (output,) = copier.outputs(group)
        copier.process_ended()
        assert not await copier.drained([output])
        output.cancel()


async def test_a_guest_that_stays_stalled_is_given_up_on(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_copying, "DRAIN_TIMEOUT_S", 0.01)
    monkeypatch.setattr(stream_copying, "GUEST_TIMEOUT_S", 0.05)
    copier = copier_from(Guest(b""), pipe[1])
    async with asyncio.TaskGroup() as group:
        (output,) = copier.outputs(group)
        copier.process_ended()
        assert not await copier.drained([output])
        output.cancel()

"""A long stream continues over its own connection, and loses nothing if the agent refuses it."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor import ChannelError
from shim.agent.frames import END, framed
from shim.agent.gate import Gate
from shim.agent.guest_streams import LONG_BYTES, REQUEST_BYTES, LongStreams
from shim.errors import Unavailable
from tests.waiting import WITHIN_S, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LONG, REST = b"l" * LONG_BYTES, b"and the rest"
MANY_REQUESTS = LONG_BYTES // REQUEST_BYTES
NAME = framed(b"stdout\0box\0exec")


class Agent:
    """An agent that answers reads from a list and records what is written."""

    def __init__(self, outputs: list[bytes]) -> None:
        self.gate = Gate()
        self._outputs = outputs
        self.written = b""
        self.ended = False
        self.processes = self

    async def read_stdout(self, _container_id: str, **_: Any) -> bytes:
        return self._outputs.pop(0)

    async def write_stdin(self, _container_id: str, *, data: bytes, **_: Any) -> None:
        self.written += data

    async def close_stdin(self, _container_id: str, **_: Any) -> None:
        self.ended = True


class Machine:
    """A machine that accepts one connection or none, and offers its other end."""

    def __init__(self) -> None:
        ours, self.guest = socket.socketpair()
        ours.setblocking(False)
        self.guest.settimeout(WITHIN_S)
        self.offered: list[socket.socket] = [ours]

    async def connect(self, port: int, **_: Any) -> socket.socket:
        if not self.offered:
            raise ChannelError(f"connect guest: port {port}: refused")
        return self.offered.pop()


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    opened = Machine()
    yield opened
    for end in (opened.guest, *opened.offered):
        end.close()


def streams(agent: Agent, machine: Machine) -> LongStreams:
    return LongStreams(agent, vm=machine, container_id="box", exec_id="exec")  # type: ignore[arg-type]  # stand-ins with the methods that are used


async def read_all(opened: LongStreams) -> bytes:
    data = b""
    async with asyncio.timeout(WITHIN_S):
        while part := await opened.read("stdout"):
            data += part
    return data


async def test_short_output_needs_no_connection(machine: Machine) -> None:
    assert await read_all(streams(Agent([REST, b""]), machine)) == REST
    assert machine.offered


async def test_long_output_continues_over_a_connection(machine: Machine) -> None:
    machine.guest.sendall(END + framed(REST) + END)
    assert await read_all(streams(Agent([LONG]), machine)) == LONG + REST
    assert machine.guest.recv(1000) == NAME
    assert machine.guest.recv(1) == b"", "the side that has read the end closes the connection"


async def test_output_of_many_requests_continues_over_a_connection(machine: Machine) -> None:
    machine.guest.sendall(END + framed(REST) + END)
    assert await read_all(streams(Agent([b"x"] * MANY_REQUESTS), machine)) == b"x" * MANY_REQUESTS + REST
    assert machine.guest.recv(1000) == NAME


async def test_input_of_many_requests_continues_over_a_connection(machine: Machine) -> None:
    agent = Agent([])
    opened = streams(agent, machine)
    machine.guest.sendall(END)
    for _ in range(MANY_REQUESTS + 1):
        await opened.write(b"x")
    assert machine.guest.recv(1000) == framed(b"stdin\0box\0exec") + framed(b"x")
    assert agent.written == b"x" * MANY_REQUESTS
    opened.close()


async def test_output_continues_in_requests_if_the_agent_does_not_listen(machine: Machine) -> None:
    machine.offered.pop().close()
    assert await read_all(streams(Agent([LONG, REST, b""]), machine)) == LONG + REST


async def test_output_continues_in_requests_if_the_agent_refuses_the_connection(machine: Machine) -> None:
    machine.guest.shutdown(socket.SHUT_WR)
    assert await read_all(streams(Agent([LONG, REST, b""]), machine)) == LONG + REST


@pytest.mark.parametrize("answer", [END, END + framed(REST), END + framed(REST)[:9], END + END + b"more"])
async def test_output_without_an_end_or_after_it_is_a_failure(machine: Machine, answer: bytes) -> None:
    machine.guest.sendall(answer)
    machine.guest.shutdown(socket.SHUT_WR)
    opened = streams(Agent([LONG]), machine)
    with pytest.raises(Unavailable, match="stdio"):
        await read_all(opened)
    opened.close()


async def test_bytes_after_the_end_fail_only_after_the_output_is_read(machine: Machine) -> None:
    machine.guest.sendall(END + framed(REST) + framed(REST) + END + b"more")
    opened = streams(Agent([LONG]), machine)
    assert [await opened.read("stdout") for _ in range(3)] == [LONG, REST, REST]
    for _ in range(2):
        with pytest.raises(Unavailable, match="4 bytes after the end"):
            await opened.read("stdout")
    opened.close()


async def test_endless_output_is_received_only_as_fast_as_it_is_read(machine: Machine) -> None:
    machine.guest.sendall(END + b"\xff\xff\xff\xff")
    opened = streams(Agent([LONG]), machine)
    assert await opened.read("stdout") == LONG
    machine.guest.settimeout(0.1)
    with pytest.raises(TimeoutError):
        machine.guest.sendall(LONG * 100)
    assert set(await opened.read("stdout")) == set(LONG)
    opened.close()


async def test_long_input_continues_over_a_connection_until_the_agent_has_read_it(
    machine: Machine,
) -> None:
    agent = Agent([])
    opened = streams(agent, machine)
    await opened.write(LONG)
    machine.guest.sendall(END)
    await opened.write(REST)
    ending = asyncio.create_task(opened.end_input())
    await settle()
    assert not ending.done()
    assert machine.guest.recv(1000) == framed(b"stdin\0box\0exec") + framed(REST) + END
    machine.guest.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(WITHIN_S):
        await ending
    assert (agent.written, agent.ended) == (LONG, False)


async def test_short_input_needs_no_connection(machine: Machine) -> None:
    agent = Agent([])
    opened = streams(agent, machine)
    await opened.write(REST)
    await opened.end_input()
    assert (agent.written, agent.ended) == (REST, True)
    assert machine.offered

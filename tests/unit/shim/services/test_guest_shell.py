"""A client's conversation with a process in the guest: streams, size, status, and an end without a rest."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, cast

import pytest

from proto.hako import management_pb2 as api
from shim.errors import InvalidArgument, NotFound, Unavailable
from shim.services.guest_shell import converse
from tests.waiting import settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from proto.kata import agent_pb2
    from shim.agent.client import Agent
    from shim.errors import ShimError

Said = api.ExecRequest


class Guest:
    """The agent's calls about processes, with one process that the test plays."""

    def __init__(self) -> None:
        self.processes = self
        self.made: list[agent_pb2.ExecProcessRequest] = []
        self.told: list[object] = []
        self.status: asyncio.Future[int] = asyncio.Future()
        self.outputs: dict[str, asyncio.Queue[bytes]] = {"out": asyncio.Queue(), "err": asyncio.Queue()}
        #: The answer to each thing that the process is told.
        self.refusal: ShimError | None = None

    def write(self, name: str, *parts: bytes) -> None:
        for part in parts:
            self.outputs[name].put_nowait(part)

    def end(self, status: int) -> None:
        self.status.set_result(status)
        for output in self.outputs.values():
            output.put_nowait(b"")

    async def execute(self, request: agent_pb2.ExecProcessRequest) -> None:
        self.made.append(request)

    async def wait(self, _container: str, *, exec_id: str) -> int:
        assert exec_id == self.made[0].exec_id
        return await asyncio.shield(self.status)

    async def signal(self, _container: str, *, exec_id: str, signal: int) -> None:
        assert exec_id == self.made[0].exec_id
        self._tell(("signal", signal))
        self.end(128 + signal)

    async def read_stdout(self, *_: object, **__: object) -> bytes:
        return await self.outputs["out"].get()

    async def read_stderr(self, *_: object, **__: object) -> bytes:
        return await self.outputs["err"].get()

    async def write_stdin(self, _container: str, *, exec_id: str, data: bytes) -> None:  # noqa: ARG002 - as called
        self._tell(data)

    async def close_stdin(self, _container: str, *, exec_id: str) -> None:  # noqa: ARG002 - as called
        self._tell("end of input")

    async def resize_terminal(self, _container: str, *, exec_id: str, rows: int, columns: int) -> None:  # noqa: ARG002 - as called
        self._tell((rows, columns))

    def _tell(self, what: object) -> None:
        self.told.append(what)
        if self.refusal is not None:
            raise self.refusal


@pytest.fixture
async def guest() -> Guest:
    return Guest()


async def said(*messages: Said) -> AsyncIterator[Said]:
    """What a client says, which then stays and listens."""
    for message in messages:
        yield message
    await asyncio.Event().wait()


def conversation(guest: Guest, *messages: Said, **start: object) -> AsyncGenerator[api.ExecResponse, None]:
    begin = Said.Start(**start)  # type: ignore[arg-type]  # each test's own fields
    return converse(cast("Agent", guest), begin, said(*messages))


async def answers(guest: Guest, *messages: Said, **start: object) -> list[api.ExecResponse]:
    runs, *others = [answer async for answer in conversation(guest, *messages, **start)]
    assert runs == api.ExecResponse(), "a client may speak now"
    return others


async def test_the_process_is_made_as_the_client_asks(guest: Guest) -> None:
    guest.end(0)
    await answers(guest, args=["ps", "-e"], env=["TERM=linux"], terminal=True, rows=30, columns=100)

    [made] = guest.made
    process = made.process
    assert (list(process.Args), list(process.Env), process.Terminal) == (["ps", "-e"], ["TERM=linux"], True)
    assert (process.ConsoleSize.Height, process.ConsoleSize.Width) == (30, 100)


async def test_its_output_comes_whole_and_the_status_last(guest: Guest) -> None:
    parts = [b"%d" % number for number in range(20)]  # more than wait for the client
    guest.write("out", *parts)
    guest.write("err", b"oops")
    guest.end(7)

    *outputs, status = await answers(guest)

    assert [each.stdout for each in outputs if each.stdout] == parts
    assert [each.stderr for each in outputs if each.stderr] == [b"oops"]
    assert (status.WhichOneof("said"), status.exit_status) == ("exit_status", 7)
    assert ("signal", signal.SIGKILL) not in guest.told


async def test_a_terminal_has_one_output(guest: Guest) -> None:
    guest.write("out", b"shown")
    guest.write("err", b"never read")
    guest.end(0)

    assert await answers(guest, terminal=True) == [
        api.ExecResponse(stdout=b"shown"),
        api.ExecResponse(exit_status=0),
    ]


async def test_what_the_client_says_reaches_the_process_in_order(guest: Guest) -> None:
    messages = [Said(stdin=b"typed"), Said(size=Said.Size(rows=3, columns=4)), Said(end_of_stdin=True)]
    asking = asyncio.create_task(answers(guest, *messages))
    await settle()
    guest.end(0)
    await asking

    assert guest.told == [b"typed", (3, 4), "end of input"]


@pytest.mark.parametrize(
    "message", [Said(stdin=b"typed"), Said(size=Said.Size(rows=3, columns=4)), Said(end_of_stdin=True)]
)
async def test_words_to_a_process_that_has_just_ended_do_not_hide_its_status(
    guest: Guest, message: Said
) -> None:
    guest.refusal = NotFound("process: not in the guest")
    asking = asyncio.create_task(answers(guest, message))
    await settle()
    guest.write("out", b"done")
    guest.end(3)

    assert await asking == [api.ExecResponse(stdout=b"done"), api.ExecResponse(exit_status=3)]


async def test_a_message_that_says_nothing_is_refused_and_the_process_killed(guest: Guest) -> None:
    with pytest.raises(InvalidArgument, match="update the client"):
        await answers(guest, Said())

    assert guest.told == [("signal", signal.SIGKILL)]


async def test_a_guest_that_is_lost_fails_the_conversation(guest: Guest) -> None:
    guest.refusal = Unavailable("agent: the connection is lost")
    guest.status.set_exception(guest.refusal)
    with pytest.raises(Unavailable, match="the connection is lost"):
        await answers(guest)


async def test_a_process_is_killed_and_its_output_read_to_the_end_if_the_client_leaves(guest: Guest) -> None:
    guest.write("out", b"first", b"never taken", b"nor this")
    talking = conversation(guest)
    async with contextlib.aclosing(talking):
        assert await anext(talking) == api.ExecResponse()
        assert await anext(talking) == api.ExecResponse(stdout=b"first")

    assert guest.told == [("signal", signal.SIGKILL)]
    assert [each.qsize() for each in guest.outputs.values()] == [0, 0], "the guest keeps what is not read"

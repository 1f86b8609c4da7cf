"""A process in a guest, with its streams in one conversation: what ``hako exec`` asks for."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from typing import TYPE_CHECKING

from proto.extensions import GUEST_ID
from proto.hako import management_pb2 as api
from proto.kata import agent_pb2
from shim.errors import InvalidArgument, ShimError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from shim.agent.client import Agent
    from shim.agent.process_calls import ProcessCalls

_READ_BYTES = 64 << 10
_WAITING_ANSWERS = 4  # more output waits in the guest until the client has taken some
_KILL_TIMEOUT_S = 5.0


async def converse(
    agent: Agent, start: api.ExecRequest.Start, requests: AsyncIterator[api.ExecRequest]
) -> AsyncGenerator[api.ExecResponse, None]:
    """Run a process in the guest; it is killed if the client leaves before its end.

    :param agent: the guest's; it must have announced that it can.
    :param start: which process.
    :param requests: what the client says after that.
    :returns: an empty answer once it runs, its output, and its exit status at the end.
    :raises ShimError: as the agent refuses.
    """
    conversation = _Conversation(agent.processes, start)
    await conversation.begin()
    work = asyncio.create_task(conversation.work(requests))
    try:
        while (answer := await conversation.answers.get()) is not None:
            yield answer
        if conversation.failure is not None:
            raise conversation.failure
    finally:
        work.cancel()
        await asyncio.wait({work})
        await conversation.end()


class _Conversation:
    def __init__(self, processes: ProcessCalls, start: api.ExecRequest.Start) -> None:
        self.answers: asyncio.Queue[api.ExecResponse | None] = asyncio.Queue(_WAITING_ANSWERS)
        self.answers.put_nowait(api.ExecResponse())
        self.failure: Exception | None = None
        self._processes = processes
        self._start = start
        self._exec_id = secrets.token_hex(8)
        self._has_ended = False

    async def begin(self) -> None:
        request = agent_pb2.ExecProcessRequest(container_id=GUEST_ID, exec_id=self._exec_id)
        process = request.process
        process.Terminal = self._start.terminal
        process.Args.extend(self._start.args)
        process.Env.extend(self._start.env)
        process.ConsoleSize.Height, process.ConsoleSize.Width = self._start.rows, self._start.columns
        await self._processes.execute(request)

    async def work(self, requests: AsyncIterator[api.ExecRequest]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(self._listen(requests))
                outputs = [group.create_task(self._copy(output)) for output in self._outputs]
                status = await self._processes.wait(GUEST_ID, exec_id=self._exec_id)
                await asyncio.wait(outputs)
                self._has_ended = True
                listening.cancel()
            await self.answers.put(api.ExecResponse(exit_status=status))
        except ExceptionGroup as errors:
            self.failure = errors.exceptions[0]
        await self.answers.put(None)

    async def _listen(self, requests: AsyncIterator[api.ExecRequest]) -> None:
        async for request in requests:
            said = request.WhichOneof("said")
            if said not in {"stdin", "size", "end_of_stdin"}:
                raise InvalidArgument("exec: a message says nothing that is known; update the client")
            with contextlib.suppress(ShimError):  # it reads no more, or has ended: its status says so
                await self._pass_on(said, request)

    async def _pass_on(self, said: str, request: api.ExecRequest) -> None:
        match said:
            case "stdin":
                await self._processes.write_stdin(GUEST_ID, exec_id=self._exec_id, data=request.stdin)
            case "size":
                size = request.size
                await self._processes.resize_terminal(
                    GUEST_ID, exec_id=self._exec_id, rows=size.rows, columns=size.columns
                )
            case _:
                await self._processes.close_stdin(GUEST_ID, exec_id=self._exec_id)

    @property
    def _outputs(self) -> list[str]:
        return ["stdout"] if self._start.terminal else ["stdout", "stderr"]

    async def _read(self, output: str) -> bytes:
        read = self._processes.read_stdout if output == "stdout" else self._processes.read_stderr
        return await read(GUEST_ID, exec_id=self._exec_id, length=_READ_BYTES)

    async def _copy(self, output: str) -> None:
        while data := await self._read(output):
            await self.answers.put(
                api.ExecResponse(stdout=data) if output == "stdout" else api.ExecResponse(stderr=data)
            )

    async def end(self) -> None:
        """Kill the process, if it has not ended, and read what is left, so that the guest forgets it."""
        if self._has_ended:
            return
        with contextlib.suppress(ShimError, TimeoutError):  # the machine may be gone
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                await self._processes.signal(GUEST_ID, exec_id=self._exec_id, signal=signal.SIGKILL)
                await self._processes.wait(GUEST_ID, exec_id=self._exec_id)
                for output in self._outputs:
                    while await self._read(output):
                        pass

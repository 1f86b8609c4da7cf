"""Calls to the guest's agent about processes and their streams."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from proto.kata import agent_pb2
from shim.errors import ShimError

if TYPE_CHECKING:
    from proto.kata import oci_pb2
    from shim.agent.connection import AgentConnection

log = logging.getLogger(__name__)

SIGNAL_TIMEOUT_S = 10.0  # a kill must fail, or end the machine, before a client gives up
_MAX_STATUS = 255  # wait(2); containerd's own value for an unknown exit status, too


class ProcessCalls:
    """Calls about the processes of one sandbox. All ids are the agent's.

    :param connection: to the agent.
    """

    def __init__(self, connection: AgentConnection) -> None:
        self._connection = connection

    @property
    def run_in_guest(self) -> bool:
        """Whether the agent can run processes in the guest itself, in no container."""
        return self._connection.features.runs_shells

    async def execute(self, request: agent_pb2.ExecProcessRequest) -> None:
        """Create and start another process in a container."""
        await self._connection.call("ExecProcess", request, Empty)
        await self.size_terminal(request, request.process)

    async def size_terminal(
        self, made: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest, process: oci_pb2.Process
    ) -> None:
        """Give a new terminal the size that its process asks for; a stock agent ignores that size."""
        size = process.ConsoleSize
        if self._connection.features.is_hako or not (process.Terminal and size.Height and size.Width):
            return
        try:
            await self.resize_terminal(
                made.container_id, exec_id=made.exec_id, rows=size.Height, columns=size.Width
            )
        except ShimError as error:  # the process exists, and may have ended already
            log.warning("terminal: %s of %s: its size stays: %s", made.exec_id, made.container_id, error)

    async def signal(self, container_id: str, *, exec_id: str, signal: int) -> None:
        """Send a signal; an empty ``exec_id`` with SIGKILL reaches every process of the container."""
        request = agent_pb2.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=signal)
        await self._connection.call("SignalProcess", request, Empty, timeout_s=SIGNAL_TIMEOUT_S)

    async def wait(self, container_id: str, *, exec_id: str) -> int:
        """Block until a process ends.

        :returns: its exit code, or 128 plus the signal's number; 255 if the agent's answer is impossible.
        """
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        reply = await self._connection.call(
            "WaitProcess", request, agent_pb2.WaitProcessResponse, timeout_s=None
        )
        return reply.status if 0 <= reply.status <= _MAX_STATUS else _MAX_STATUS

    async def read_stdout(self, container_id: str, *, exec_id: str, length: int) -> bytes:
        """Block until there is output; empty means end of file."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=length)
        return (
            await self._connection.call("ReadStdout", request, agent_pb2.ReadStreamResponse, timeout_s=None)
        ).data

    async def read_stderr(self, container_id: str, *, exec_id: str, length: int) -> bytes:
        """Like :meth:`read_stdout`, for standard error."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=length)
        return (
            await self._connection.call("ReadStderr", request, agent_pb2.ReadStreamResponse, timeout_s=None)
        ).data

    async def write_stdin(self, container_id: str, *, exec_id: str, data: bytes) -> None:
        """Write all of ``data``; blocks while the process does not read, hence no deadline."""
        request = agent_pb2.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
        await self._connection.call("WriteStdin", request, agent_pb2.WriteStreamResponse, timeout_s=None)

    async def close_stdin(self, container_id: str, *, exec_id: str) -> None:
        """Close the process's input. Not for a terminal, where that means a hang-up."""
        request = agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id)
        await self._connection.call("CloseStdin", request, Empty)

    async def resize_terminal(self, container_id: str, *, exec_id: str, rows: int, columns: int) -> None:
        """Set the size of a process's terminal."""
        request = agent_pb2.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=rows, column=columns
        )
        await self._connection.call("TtyWinResize", request, Empty)

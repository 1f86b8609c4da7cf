"""How a process' streams cross between the guest and the host, with the same bytes either way.

Raw streams if the channel has them, requests to the agent otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from hypervisor import RAW_STREAM_PORT, ChannelError
from shim.errors import Unavailable

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from hypervisor import Hypervisor
    from proto.kata import agent_pb2
    from shim.agent import Agent

log = logging.getLogger(__name__)

READ_BYTES = 1024 * 1024  # the agent's limit, and what its pipes hold: a round trip costs more than the bytes
CONNECT_TIMEOUT_S = 1.0  # the agent serves by now: whoever does not listen never will


class Transfer(Protocol):
    """The streams of one process as the host sees them."""

    def announce(self, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest) -> None:
        """Say in the request that makes the process where its streams are."""

    async def read(self, name: str) -> bytes:
        """Block until ``stdout`` or ``stderr`` has bytes; empty at its end.

        :raises ShimError: if the guest is gone, or has no such stream.
        """

    async def write(self, data: bytes) -> None:
        """Write all of ``data`` to stdin; blocks while the process does not read.

        :raises ShimError: if the process does not read any more.
        """

    async def end_input(self) -> None:
        """Give the process end of file on its input. Not for a terminal: there it means hang-up.

        :raises ShimError: if the process is gone.
        """

    def close(self) -> None:
        """Give up what is left. May be called repeatedly."""


class Requests:
    """Streams carried by requests to the agent, each of them answered before the next.

    :param agent: the agent.
    :param container_id: the container's id at the agent.
    :param exec_id: the process' id at the agent.
    """

    def __init__(self, agent: Agent, *, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._container_id = container_id
        self._exec_id = exec_id

    def announce(self, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest) -> None:
        """Streams without a port are carried by requests."""

    async def read(self, name: str) -> bytes:
        """Block until there is output; empty at its end."""
        read = self._agent.read_stdout if name == "stdout" else self._agent.read_stderr
        return await read(self._container_id, exec_id=self._exec_id, length=READ_BYTES)

    async def write(self, data: bytes) -> None:
        """Write to stdin."""
        await self._agent.write_stdin(self._container_id, exec_id=self._exec_id, data=data)

    async def end_input(self) -> None:
        """End stdin."""
        await self._agent.close_stdin(self._container_id, exec_id=self._exec_id)

    def close(self) -> None:
        """Nothing is held here."""


class RawStreams:
    """Streams with a connection each, which the agent knows by the ports they come from.

    :param connections: by the stream's name.
    """

    def __init__(self, connections: dict[str, socket.socket]) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, vm: Hypervisor, names: Iterable[str]) -> RawStreams | None:
        """Connect the streams of a process that is not yet made.

        :param names: the streams wanted: ``stdin``, ``stdout``, ``stderr``.
        :returns: None if the guest's agent does not listen for them.
        """
        streams = cls({})
        try:
            for name in names:
                streams._connections[name] = await vm.connect(RAW_STREAM_PORT, timeout_s=CONNECT_TIMEOUT_S)
        except ChannelError as error:
            streams.close()
            log.warning("stdio: no raw streams: %s", error)
            return None
        except BaseException:
            streams.close()
            raise
        log.debug("stdio: raw streams: %s", ", ".join(streams._connections))
        return streams

    def announce(self, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest) -> None:
        """Tell the agent the ports that the connections come from."""
        for name, connection in self._connections.items():
            setattr(request, f"{name}_port", connection.getsockname()[1])

    async def read(self, name: str) -> bytes:
        """Block until there is output; empty at its end."""
        try:
            data = await self._loop.sock_recv(self._connections[name], READ_BYTES)
        except OSError as error:
            raise Unavailable(f"stdio: {name}: {error.strerror}") from error
        if not data:
            self._close(name)
        return data

    async def write(self, data: bytes) -> None:
        """Write to stdin."""
        try:
            await self._loop.sock_sendall(self._connections["stdin"], data)
        except OSError as error:
            raise Unavailable(f"stdio: stdin: {error.strerror}") from error

    async def end_input(self) -> None:
        """End stdin."""
        self._close("stdin")

    def close(self) -> None:
        """Close every connection."""
        for name in list(self._connections):
            self._close(name)

    def _close(self, name: str) -> None:
        self._connections.pop(name).close()

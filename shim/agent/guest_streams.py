"""The guest's ends of a process's streams, as the shim reads and writes them.

Streams are raw if the channel supports that; otherwise they travel in requests to the agent. With Hako's
agent, a stream of many bytes or many requests then continues over its own connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Protocol, Self

from hypervisor import ChannelError
from proto.extensions import FRAMED_STREAM_PORT, RAW_STREAM_PORT
from shim.agent.frames import END, StreamFrameError, Unframer, framed
from shim.errors import Unavailable
from shim.override import override

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from hypervisor import Hypervisor
    from proto.kata import agent_pb2
    from shim.agent.client import Agent

log = logging.getLogger(__name__)

READ_BYTES = 1024 * 1024  # the agent's limit and its pipes' capacity; a round trip costs more than the bytes
LONG_BYTES = 256 * 1024  # beyond it, a connection pays off; making one costs as much as two requests
REQUEST_BYTES = 32 * 1024  # what a request counts for beside its bytes, so that a dialogue is long, too
RECEIVE_BYTES = 256 * 1024  # more than a socket holds
LONG_CONNECT_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 1.0  # the agent already serves, so a port without a listener will never get one


class GuestStreams(Protocol):
    """The guest's ends of one process's streams."""

    def announce(self, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest) -> None:
        """Write the places of the streams into the request that makes the process."""

    async def read(self, name: str) -> bytes | memoryview:
        """Block until ``stdout`` or ``stderr`` has bytes; empty at its end.

        :raises ShimError: if the guest is gone, or has no such stream.
        """

    async def write(self, data: bytes) -> None:
        """Write all of ``data`` to stdin; blocks while the process does not read.

        :raises ShimError: if the process has stopped reading.
        """

    async def end_input(self) -> None:
        """Close the process's input. Not for a terminal, where that means a hang-up.

        :raises ShimError: if the process is gone.
        """

    def close(self) -> None:
        """Close the streams that are still open. May be called repeatedly."""


class RequestStreams:
    """Streams in requests to the agent, one request after another.

    :param agent: the agent.
    :param container_id: the container's id at the agent.
    :param exec_id: the process's id at the agent.
    """

    def __init__(self, agent: Agent, *, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._container_id = container_id
        self._exec_id = exec_id

    def announce(self, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest) -> None:
        """Write nothing: streams without a port travel in requests."""

    async def read(self, name: str) -> bytes | memoryview:
        """Block until there is output; empty at its end."""
        read = self._agent.processes.read_stdout if name == "stdout" else self._agent.processes.read_stderr
        return await read(self._container_id, exec_id=self._exec_id, length=READ_BYTES)

    async def write(self, data: bytes) -> None:
        """Write to stdin."""
        await self._agent.processes.write_stdin(self._container_id, exec_id=self._exec_id, data=data)

    async def end_input(self) -> None:
        """End stdin."""
        await self._agent.processes.close_stdin(self._container_id, exec_id=self._exec_id)

    def close(self) -> None:
        """Do nothing, because requests leave nothing open."""


class LongStreams(RequestStreams):
    """Streams that begin as requests; a long one continues over its own connection.

    :param agent: the agent.
    :param vm: the virtual machine, whose channel allows more connections.
    :param container_id: the container's id at the agent.
    :param exec_id: the process's id at the agent.
    """

    def __init__(self, agent: Agent, *, vm: Hypervisor, container_id: str, exec_id: str) -> None:
        super().__init__(agent, container_id=container_id, exec_id=exec_id)
        self._vm = vm
        self._name = f"{container_id}\0{exec_id}"
        self._carried = dict.fromkeys(("stdin", "stdout", "stderr"), 0)
        self._connections: dict[str, _Connection] = {}

    @override
    async def read(self, name: str) -> bytes | memoryview:
        """Block until there is output; empty at its end."""
        if await self._is_long(name):
            # A vsock that is read from may tell the guest, whose machine may be parked.
            await self._agent.gate.free()
            return await self._connections[name].read()
        data = await super().read(name)
        self._carried[name] += REQUEST_BYTES + len(data)
        return data

    @override
    async def write(self, data: bytes) -> None:
        """Write to stdin."""
        await self._agent.gate.free()
        if await self._is_long("stdin"):
            await self._connections["stdin"].send(framed(data))
            return
        await super().write(data)
        self._carried["stdin"] += REQUEST_BYTES + len(data)

    @override
    async def end_input(self) -> None:
        """End stdin; a connection's bytes have all been read then."""
        if "stdin" in self._connections:
            await self._agent.gate.free()
            await self._connections["stdin"].finish()
        else:
            await super().end_input()

    @override
    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections.values():
            connection.close()

    async def _is_long(self, name: str) -> bool:
        if name in self._connections:
            return True
        if self._carried[name] < LONG_BYTES:
            return False
        self._carried[name] = 0  # after a refusal, the next attempt comes as late as the first
        connection = await _Connection.open(self._vm, f"{name}\0{self._name}")
        if connection is None:
            return False
        self._connections[name] = connection
        return True


class _Connection:
    """A connection for one stream, in frames, because some vsocks lack half-closed connections.

    :param connection: to the agent.
    :param name: the name of the stream.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._unframer = Unframer()
        self._received: deque[memoryview] = deque()
        self._mistake: StreamFrameError | None = None

    @classmethod
    async def open(cls, vm: Hypervisor, name: str) -> Self | None:
        """Connect to the agent and name the stream.

        :returns: None if the agent refuses it.
        """
        opened: _Connection | None = None
        try:
            opened = cls(await vm.connect(FRAMED_STREAM_PORT, timeout_s=LONG_CONNECT_TIMEOUT_S), name)
            await opened.send(framed(name.encode()))
            await opened._be_accepted()
        except (ChannelError, Unavailable) as error:
            log.warning("stdio: no connection for %s: %s", name.replace("\0", " "), error)
            if opened is not None:
                opened.close()
            return None
        except BaseException:
            if opened is not None:
                opened.close()
            raise
        return opened

    async def _be_accepted(self) -> None:
        # No deadline: once the agent has accepted, a new attempt could lose bytes in flight.
        answer = b""
        while len(answer) < len(END):
            data = await self._receive(len(END) - len(answer))
            if not data:
                raise Unavailable("the agent refuses")
            answer += data

    async def read(self) -> memoryview:
        """Block until there are bytes; empty at the end.

        :raises Unavailable: if the guest is gone or breaks the framing; bytes before that are read first.
        """
        while not self._received:
            if self._mistake is not None:
                raise Unavailable(f"stdio: {self._name}: {self._mistake}") from self._mistake
            if self._unframer.ended:
                self.close()
                return memoryview(b"")
            data = await self._receive(RECEIVE_BYTES)
            if not data:
                raise Unavailable(f"stdio: {self._name}: the guest has broken it off")
            try:
                self._received.extend(self._unframer.feed(data))
            except StreamFrameError as error:
                self._mistake = error
        return self._received.popleft()

    async def send(self, data: bytes) -> None:
        """Send all of ``data``.

        :raises Unavailable: if the process has stopped reading.
        """
        try:
            await self._loop.sock_sendall(self._connection, data)
        except OSError as error:
            raise Unavailable(f"stdio: {self._name}: {error.strerror}") from error

    async def finish(self) -> None:
        """Send the end, and wait until the agent has read it and closes.

        :raises Unavailable: if the process has stopped reading.
        """
        await self.send(END)
        await self._receive(1)
        self.close()

    def close(self) -> None:
        """Close it. May be called repeatedly."""
        self._connection.close()

    async def _receive(self, most: int) -> bytes:
        try:
            return await self._loop.sock_recv(self._connection, most)
        except OSError as error:
            raise Unavailable(f"stdio: {self._name}: {error.strerror}") from error


class RawStreams:
    """Streams with one connection each; the agent recognizes them by their source ports.

    :param connections: by the stream's name.
    """

    def __init__(self, connections: dict[str, socket.socket]) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, vm: Hypervisor, names: Iterable[str]) -> RawStreams | None:
        """Connect the streams of a process that does not exist yet.

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
        """Tell the agent the source ports of the connections."""
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

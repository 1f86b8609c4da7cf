"""The ttrpc client: any number of concurrent calls over one connection."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError, Message

from hypervisor import LastingSocket
from proto import ttrpc_pb2
from shim.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable, from_code
from shim.override import override
from shim.transport.ttrpc_codec import (
    MAX_BODY,
    MAX_STREAM_ID,
    Frame,
    FrameError,
    FrameType,
    OversizedFrame,
    encode_request,
)
from shim.transport.ttrpc_connection import TtrpcConnection

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

M = TypeVar("M", bound=Message)

_NO_METADATA: Mapping[str, str] = MappingProxyType({})
_MAX_NANO = (1 << 63) - 1


class _ServerConnection(TtrpcConnection):
    """Hands each answer to the call that waits for it; None stands for the end of the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[int, asyncio.Future[Frame | OversizedFrame | None]] = {}
        self.given_up = 0
        """How many cancelled or timed-out calls may still get an answer."""

    @override
    def frame_received(self, frame: Frame | OversizedFrame) -> None:
        if frame.kind is not FrameType.RESPONSE:
            raise FrameError(f"a server sent a {frame.kind.name.lower()} frame")
        waiting = self.pending.pop(frame.stream_id, None)
        if waiting is None:
            if not self.given_up:
                raise FrameError(f"a server answered call {frame.stream_id}, which was not made, or twice")
            self.given_up -= 1
        elif not waiting.done():
            waiting.set_result(frame)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for waiting in self.pending.values():
            if not waiting.done():
                waiting.set_result(None)
        self.pending.clear()


class TtrpcClient:
    """A connection to a ttrpc server; made with :meth:`over`, ended with :meth:`aclose`."""

    def __init__(self, connection: _ServerConnection) -> None:
        self._connection = connection
        self._next_stream_id = 1

    @classmethod
    async def over(cls, sock: socket.socket) -> TtrpcClient:
        """Speak ttrpc over a connected stream socket, which the client owns from now on."""
        _, connection = await asyncio.get_running_loop().create_connection(
            _ServerConnection, sock=LastingSocket(sock)
        )
        return cls(connection)

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        response_type: type[M],
        *,
        timeout_s: float | None,
        metadata: Mapping[str, str] = _NO_METADATA,
        most_bytes: int = MAX_BODY,
    ) -> M:
        """Call one method and wait for its answer. Cancelling the caller does not affect other calls.

        :param service: full name, such as ``grpc.AgentService``.
        :param method: bare name, such as ``CreateContainer``.
        :param timeout_s: seconds until both sides give the call up; None for calls that wait for an event.
        :param metadata: headers, lower-case.
        :param most_bytes: the most bytes of the answer, up to 4 MiB; a longer one is not decoded.
        :raises DeadlineExceeded: if no answer came in time.
        :raises Unavailable: if the connection is lost, before the call or during it.
        :raises ResourceExhausted: if the request is over 4 MiB, or the answer too long.
        :raises Internal: if the answer is not the response message.
        :raises ShimError: if the server answers with it.
        """
        name = f"{service}/{method}"
        payload = request.SerializeToString()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._exchange(
                    service, method, payload, timeout_s=timeout_s, metadata=metadata
                )
        except TimeoutError as error:
            raise DeadlineExceeded(f"ttrpc: {name}: no answer within {timeout_s:g} s") from error
        if answer is None:
            raise Unavailable(f"ttrpc: {name}: connection lost: {self._connection.loss_cause}")
        length = answer.length if isinstance(answer, OversizedFrame) else len(answer.body)
        if isinstance(answer, OversizedFrame) or length > most_bytes:
            raise ResourceExhausted(
                f"ttrpc: {name}: answer of {length} bytes exceeds the limit of {most_bytes}"
            )
        try:
            response = ttrpc_pb2.Response.FromString(answer.body)
            if response.status.code == 0:
                return response_type.FromString(response.payload)
        except DecodeError as error:
            expected = response_type.DESCRIPTOR.full_name
            raise Internal(f"ttrpc: {name}: answer is not a valid {expected}: {error}") from error
        raise from_code(response.status.code, response.status.message)

    async def _exchange(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        timeout_s: float | None,
        metadata: Mapping[str, str],
    ) -> Frame | OversizedFrame | None:
        connection = self._connection
        await connection.writable()
        # From here to the write, no await may follow: the server requires increasing stream ids.
        if connection.transport.is_closing():
            return None
        stream_id = self._next_stream_id
        if stream_id > MAX_STREAM_ID:
            connection.drop("all stream ids of the connection are used up; connect again")
            return None
        timeout_nano = 0 if timeout_s is None else min(max(int(timeout_s * 1e9), 1), _MAX_NANO)
        frame = encode_request(
            stream_id,
            service=service,
            method=method,
            payload=payload,
            timeout_nano=timeout_nano,
            metadata=metadata,
        )
        self._next_stream_id += 2
        waiting: asyncio.Future[Frame | OversizedFrame | None] = asyncio.get_running_loop().create_future()
        connection.pending[stream_id] = waiting
        connection.send(frame)
        try:
            return await waiting
        finally:
            if connection.pending.pop(stream_id, None) is not None:
                connection.given_up += 1

    async def wait_closed(self) -> None:
        """Wait until the connection is lost or closed."""
        await self._connection.lost.wait()

    async def aclose(self) -> None:
        """Hang up; calls in flight fail with :class:`~shim.errors.Unavailable`."""
        self._connection.drop("closed by this side")
        await self._connection.lost.wait()

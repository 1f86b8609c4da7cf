"""The ttrpc server: frames from a stream socket to the dispatch table, and answers back."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from proto import ttrpc_pb2
from shim.errors import InvalidArgument, ResourceExhausted, ShimError, Unimplemented
from shim.override import override
from shim.transport.dispatch import Dispatch, status_text
from shim.transport.ttrpc_codec import (
    MAX_BODY,
    Frame,
    FrameError,
    FrameType,
    OversizedFrame,
    encode_error,
    encode_response,
)
from shim.transport.ttrpc_connection import TtrpcConnection

if TYPE_CHECKING:
    import socket

    from shim.transport.dispatch import Heed

_LINGER_S = 2.0  # containerd hangs up milliseconds after the last answer, on a loaded host later


class _ClientConnection(TtrpcConnection):
    """One client: each request is a task that the end of the connection cancels.

    While the client does not read its answers, no more requests are read from it, and earlier requests wait:
    a client that only sends requests cannot make memory grow.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        calls: asyncio.TaskGroup,
        connections: set[_ClientConnection],
        heed: Heed | None,
    ) -> None:
        super().__init__()
        self._heed = heed
        self._dispatch = dispatch
        self._calls = calls
        self._connections = connections
        self._handlers: set[asyncio.Task[None]] = set()
        self._last_stream_id = 0
        self._draining = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.add(self)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.discard(self)
        for handler in self._handlers:
            handler.cancel()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()

    @override
    def frame_received(self, frame: Frame | OversizedFrame) -> None:
        if self._draining:
            return  # the client will see the end of the connection
        try:
            request = self._check(frame)
        except ShimError as error:
            # It need not wait for room, because no request is read while there is none.
            self.send(encode_error(frame.stream_id, code=error.code, message=status_text(error)))
            return
        handler = self._calls.create_task(self._serve(request))
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)

    def _check(self, frame: Frame | OversizedFrame) -> Frame:
        """Refuse frames that do not begin a plain request (rules of the ttrpc 1.2 server)."""
        if frame.kind is FrameType.RESPONSE:
            raise FrameError("a client sent a response")
        if frame.kind is FrameType.DATA:
            raise InvalidArgument(f"ttrpc: stream {frame.stream_id} is not open")
        if frame.stream_id % 2 == 0:
            raise InvalidArgument(f"ttrpc: stream id {frame.stream_id} of a client must be odd")
        if frame.stream_id <= self._last_stream_id:
            raise InvalidArgument(
                f"ttrpc: stream id {frame.stream_id} must exceed the last, {self._last_stream_id}"
            )
        self._last_stream_id = frame.stream_id
        if isinstance(frame, OversizedFrame):
            raise ResourceExhausted(f"ttrpc: message of {frame.length} bytes exceeds the limit of {MAX_BODY}")
        if frame.flags:
            raise Unimplemented("ttrpc: streaming calls are not offered")
        return frame

    async def _serve(self, frame: Frame) -> None:
        await self.writable()
        try:
            answer = encode_response(frame.stream_id, await self._call(frame.body))
        except ShimError as error:
            answer = encode_error(frame.stream_id, code=error.code, message=status_text(error))
        await self.writable()
        self.send(answer)

    async def _call(self, body: bytes) -> bytes:
        try:
            request = ttrpc_pb2.Request.FromString(body)
        except DecodeError as error:
            raise InvalidArgument(f"ttrpc: request is not valid: {error}") from error
        if self._heed is not None:
            self._heed(request.method, request.payload, [(each.key, each.value) for each in request.metadata])
        method = self._dispatch.find(request.service, request.method)
        timeout_s = request.timeout_nano / 1e9 if request.timeout_nano else None
        return await method.answer(request.payload, timeout_s=timeout_s)

    def refuse_requests(self) -> None:
        """Refuse further requests."""
        self._draining = True

    async def finish(self) -> None:
        """Wait until every request is answered and every answer sent, then hang up.

        The client gets time to hang up first. If it saw the end of the connection together with an answer,
        it might report the end instead, as containerd's does.
        """
        if self._handlers:
            await asyncio.wait(self._handlers)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await self.lost.wait()
        self.transport.close()
        await self.lost.wait()


class TtrpcServer:
    """Serves one dispatch table to any number of concurrent clients.

    :param dispatch: the methods offered.
    :param heed: told the method, the request and the headers of each request before it is served.
    """

    def __init__(self, dispatch: Dispatch, *, heed: Heed | None = None) -> None:
        self._dispatch = dispatch
        self._heed = heed
        self._connections: set[_ClientConnection] = set()
        self._draining = asyncio.Event()
        self._drained = asyncio.Event()

    async def serve(self, listener: socket.socket) -> None:
        """Accept and answer until cancelled, which cancels every handler, or until :meth:`drain` is done.

        :param listener: a bound stream socket; it is closed at the end, and its path stays.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as calls:
            server = await loop.create_server(
                lambda: _ClientConnection(self._dispatch, calls, self._connections, self._heed), sock=listener
            )
            try:
                await self._draining.wait()
                server.close()
                await self._drained.wait()
            finally:
                server.close()
                for connection in self._connections:
                    connection.drop("the server stops")

    async def drain(self, timeout_s: float) -> None:
        """Accept no more requests, answer those in flight, hang up, and let :meth:`serve` return.

        A handler must not wait for this, because it would wait for its own answer.

        :param timeout_s: seconds after which handlers still running are cancelled and unread answers lost.
        """
        self._draining.set()
        for connection in self._connections:
            connection.refuse_requests()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(connection.finish() for connection in self._connections))
        except TimeoutError:
            pass
        finally:
            self._drained.set()

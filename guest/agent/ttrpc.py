"""ttrpc server: frames in, frames out, every request in its own thread.

Frame: length (u32), stream id (u32), type (u8), flags (u8), all big-endian, then the payload.
"""

from __future__ import annotations

import _thread
import os
import select
import struct
import time

from guest.agent import timeline, workers
from guest.agent.console import log
from guest.agent.errors import (
    AgentError,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unimplemented,
    cause,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    from guest.agent.wire import Codec, Message

    class Transport(Protocol):
        """A byte stream to the host."""

        def read(self, size: int) -> bytes:
            """Return up to size bytes, empty at the end of the stream."""

        def write(self, data: bytes) -> None:
            """Write everything."""

    Handler = Callable[[Message, "Call"], Message]
    Methods = dict[str, dict[str, tuple[str, str]]]

HEADER = struct.Struct(">IIBB")
REQUEST, RESPONSE = 1, 2
FIRST_STREAM = 1
MAX_PAYLOAD = 4 << 20
_COPY_BYTES = 1 << 14
"""From this size on, two writes cost less than joining the parts of an answer."""
LONGEST_POLL_MS = 0x7FFFFFFF  # an int in poll(2): a call that allows more than 24 days may end early


class Call:
    """The request that a handler serves.

    :param closed_fd: becomes readable when the caller is gone.
    :param timeout_ns: the caller's limit; 0 for none.
    :param afterwards: set by a handler: a function to call once the answer is on its way.
    """

    __slots__ = ("_closed_fd", "_deadline", "afterwards")

    def __init__(self, closed_fd: int, timeout_ns: int) -> None:
        self.afterwards: Callable[[], None] | None = None
        self._closed_fd = closed_fd
        self._deadline = time.monotonic() + timeout_ns / 1e9 if timeout_ns > 0 else None

    def wait(
        self,
        *,
        readable: Iterable[int],
        writable: Iterable[int] = (),
        changed: Iterable[int] = (),
        timeout_s: float | None = None,
    ) -> list[int]:
        """Wait until a descriptor is ready or at its end.

        :param readable: descriptors to read from.
        :param writable: descriptors to write to.
        :param changed: descriptors of kernel files that report their changes.
        :param timeout_s: when to give up and return nothing; None to wait on.
        :returns: those that are ready; empty after the timeout.
        :raises Cancelled: if the caller's connection is gone.
        :raises DeadlineExceeded: if the caller's own limit has passed.
        """
        poll = select.poll()
        for fd in readable:
            poll.register(fd, select.POLLIN)
        for fd in writable:
            poll.register(fd, select.POLLOUT)
        for fd in changed:
            poll.register(fd, select.POLLPRI)
        poll.register(self._closed_fd, select.POLLIN)
        until = None if timeout_s is None else time.monotonic() + timeout_s
        limits = [limit for limit in (until, self._deadline) if limit is not None]
        left_ms = None
        if limits:
            left_ms = min(max(0, int((min(limits) - time.monotonic()) * 1000) + 1), LONGEST_POLL_MS)
        ready = [fd for fd, _events in poll.poll(left_ms)]
        if self._closed_fd in ready:
            raise Cancelled("the connection is closed")
        if not ready and self._deadline is not None and (until is None or self._deadline < until):
            raise DeadlineExceeded("timeout")
        return ready


class Server:
    """The services on offer.

    :param codec: tables of all messages.
    :param methods: service to method to request and response message.
    :param handlers: method to handler; a method without one is unimplemented.
    """

    def __init__(self, codec: Codec, *, methods: Methods, handlers: dict[str, Handler]) -> None:
        self.codec = codec
        self._methods = methods
        self._handlers = handlers

    def answer(self, service: str, method: str, payload: bytes, call: Call) -> bytes:
        """Carry out one request.

        :param service: full service name.
        :param method: bare method name.
        :param payload: the encoded request.
        :param call: the request's context.
        :returns: the encoded response.
        :raises AgentError: as the handler raises it.
        """
        if service not in self._methods:
            raise InvalidArgument(f"{service} service does not exist")
        types = self._methods[service].get(method)
        handler = self._handlers.get(method)
        if types is None or handler is None:
            raise Unimplemented(f"{service}/{method} is not supported")
        response = handler(self.codec.decode(types[0], payload), call)
        return self.codec.encode(types[1], response)


class _Peer:
    """One host at the other end of a connection, and the requests that end with it."""

    __slots__ = ("_calls", "_lock", "closed_fd", "gone", "spoke")

    def __init__(self) -> None:
        self.closed_fd = os.eventfd(0)
        self.gone = False
        self.spoke = False
        self._calls = 1
        self._lock = _thread.allocate_lock()

    def hold(self) -> None:
        with self._lock:
            self._calls += 1

    def release(self) -> None:
        # The descriptor outlives the peer until no handler can poll it.
        with self._lock:
            self._calls -= 1
            last = self._calls == 0
        if last:
            os.close(self.closed_fd)


class Connection:
    """One host connection.

    :param transport: its byte stream.
    :param server: the services on offer.
    """

    def __init__(self, transport: Transport, server: Server) -> None:
        self._transport = transport
        self._server = server
        self._write_lock = _thread.allocate_lock()
        self._peer = _Peer()

    def serve(self) -> None:
        """Serve until the host closes the stream or breaks the framing."""
        try:
            while (header := self._read(HEADER.size)) is not None:
                length, stream, kind, _flags = HEADER.unpack(header)
                if length > MAX_PAYLOAD:
                    self._discard(length)
                    excess = InvalidArgument(f"frame of {length} bytes exceeds {MAX_PAYLOAD}")
                    self._fail(self._peer, stream, excess)
                    continue
                payload = self._read(length)
                if payload is None:
                    break
                self._receive(stream, kind, payload)
        except OSError as error:
            log(f"ttrpc: connection lost: {error}")
        self._dismiss()

    def _receive(self, stream: int, kind: int, payload: bytes) -> None:
        if kind != REQUEST:
            log(f"ttrpc: frame type {kind} ignored")
            return
        if stream == FIRST_STREAM and self._peer.spoke:
            # On a serial port, one host can follow another without a gap: only the stream id shows that.
            self._dismiss()
            self._peer = _Peer()
        peer = self._peer
        peer.spoke = True
        if stream % 2 == 0:
            self._fail(peer, stream, InvalidArgument("stream id must be odd"))
            return
        try:
            request = self._server.codec.decode("ttrpc.Request", payload)
        except InvalidArgument as error:
            self._fail(peer, stream, error)
            return
        peer.hold()
        workers.submit(lambda: self._handle(peer, stream, request))

    def _dismiss(self) -> None:
        with self._write_lock:
            self._peer.gone = True
        os.eventfd_write(self._peer.closed_fd, 1)
        self._peer.release()

    def _handle(self, peer: _Peer, stream: int, request: Message) -> None:
        began_s = time.monotonic()
        try:
            call = Call(peer.closed_fd, request.timeout_nano)
            payload = self._server.answer(request.service, request.method, request.payload, call)
            if len(payload) > MAX_PAYLOAD - 64:
                raise ResourceExhausted(f"answer of {len(payload)} bytes exceeds {MAX_PAYLOAD}")
            self._respond(peer, stream, 0, "", payload)
            timeline.note(request.method, began_s)
            if call.afterwards is not None:
                call.afterwards()
        except AgentError as error:
            self._fail(peer, stream, error)
        except OSError as error:
            self._fail(peer, stream, AgentError(f"{request.method}: {cause(error)}"))
        except Exception as error:  # noqa: BLE001  even after a defect, the caller needs an answer
            log(f"{request.method}: defect: {error!r}")
            self._fail(peer, stream, AgentError(f"{request.method}: defect in the agent: {error!r}"))
        peer.release()

    def _fail(self, peer: _Peer, stream: int, error: AgentError) -> None:
        self._respond(peer, stream, error.code, str(error), b"")

    def _respond(self, peer: _Peer, stream: int, code: int, message: str, payload: bytes) -> None:
        codec = self._server.codec
        status = codec.new("ttrpc.Status", code=code, message=message)
        head = codec.encode_up_to("ttrpc.Response", codec.new("ttrpc.Response", status=status), len(payload))
        frame = HEADER.pack(len(head) + len(payload), stream, RESPONSE, 0) + head
        pieces = [frame + payload] if len(payload) < _COPY_BYTES else [frame, payload]
        try:
            with self._write_lock:
                if not peer.gone:
                    for piece in pieces:
                        self._transport.write(piece)
        except OSError as error:
            log(f"ttrpc: answer lost: {error}")

    def _read(self, size: int) -> bytes | None:
        parts = []
        while size:
            part = self._transport.read(size)
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _discard(self, size: int) -> None:
        while size:
            part = self._transport.read(min(size, 65536))
            if not part:
                return
            size -= len(part)

"""A small blocking client of the agent, for tests: one connection, many calls at once."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from typing import TYPE_CHECKING

from proto import ttrpc_pb2
from proto.kata import agent_pb2, health_pb2
from tests.patience import patient

if TYPE_CHECKING:
    from typing import Any

    from google.protobuf.message import Message

HEADER = struct.Struct(">IIBB")
ANSWER_S = 200.0
"""For a guest that may make eight containers at once on a processor that others need, too."""
SERVICES = {
    service.full_name: service
    for file in (agent_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
}


class StatusError(Exception):
    """The agent answered with a status other than OK."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class AgentClient:
    """Calls methods of the agent by name."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._streams = itertools.count(1, 2)
        self._answers: dict[int, ttrpc_pb2.Response] = {}
        self._changed = threading.Condition()
        self._lost = False
        self._write_lock = threading.Lock()
        threading.Thread(target=self._receive, daemon=True).start()

    def begin(self, method: str, request: Message, *, service: str = "grpc.AgentService") -> int:
        payload = request.SerializeToString()
        body = ttrpc_pb2.Request(service=service, method=method, payload=payload).SerializeToString()
        stream = next(self._streams)
        self.send_frame(stream, 1, body)
        return stream

    def send_frame(self, stream: int, kind: int, body: bytes) -> None:
        with self._write_lock:
            self._socket.sendall(HEADER.pack(len(body), stream, kind, 0) + body)

    def answer(self, stream: int, *, timeout_s: float = ANSWER_S) -> bytes:
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: stream in self._answers or self._lost, patient(timeout_s)
            )
            if not arrived:
                raise TimeoutError(f"no answer on stream {stream} in {timeout_s} s")
            if stream not in self._answers:
                raise ConnectionError("the connection is lost")
            response = self._answers.pop(stream)
        if response.status.code:
            raise StatusError(response.status.code, response.status.message)
        return response.payload

    def call(
        self,
        method: str,
        request: Message,
        *,
        service: str = "grpc.AgentService",
        timeout_s: float = ANSWER_S,
    ) -> Any:
        stream = self.begin(method, request, service=service)
        output: Any = SERVICES[service].methods_by_name[method].output_type
        return output._concrete_class.FromString(self.answer(stream, timeout_s=timeout_s))

    def shut_down(self) -> None:
        """End the connection while calls are pending."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> None:
        try:
            while True:
                length, stream, _kind, _flags = HEADER.unpack(self._exactly(HEADER.size))
                response = ttrpc_pb2.Response.FromString(self._exactly(length))
                with self._changed:
                    self._answers[stream] = response
                    self._changed.notify_all()
        except (ConnectionError, OSError):
            with self._changed:
                self._lost = True
                self._changed.notify_all()

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._socket.recv(size - len(parts))
            if not part:
                raise ConnectionError("end of stream")
            parts += part
        return bytes(parts)

"""The guest agent's codec and server answer or refuse any bytes, or end the connection."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from guest.agent.errors import AgentError, InvalidArgument
from guest.agent.ttrpc import Connection, Server
from guest.agent.wire import Codec
from guest.image import schema
from proto import ttrpc_pb2
from proto.kata import agent_pb2, oci_pb2
from shim.transport.ttrpc_codec import Frame, FrameDecoder, FrameType, encode_frame, encode_request
from tests.fuzz.material import bent, messages
from tests.fuzz.peers import header
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


CASES = settings().max_examples
CODEC = Codec(schema.messages())
METHODS = {
    service.full_name: {
        method.name: (method.input_type.full_name, method.output_type.full_name) for method in service.methods
    }
    for service in (agent_pb2.DESCRIPTOR.services_by_name["AgentService"],)
}
SERVICE = "grpc.AgentService"
KINDS = (agent_pb2.CreateContainerRequest, agent_pb2.CreateSandboxRequest, oci_pb2.Spec, ttrpc_pb2.Request)


def serialized(kind: Any) -> Any:
    return messages(kind.DESCRIPTOR).map(lambda message: message.SerializeToString())


@settings(max_examples=3 * CASES)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_bytes_are_decoded_or_refused(data: Any, kind: Any) -> None:
    content = data.draw(st.one_of(serialized(kind), bent(serialized(kind)), st.binary(max_size=60)))
    name = kind.DESCRIPTOR.full_name
    try:
        message = CODEC.decode(name, content)
    except InvalidArgument as error:
        assert name in str(error)  # noqa: PT017 - a refusal is one of the two right outcomes
        return
    CODEC.encode(name, message)


class OverSocket:
    """A byte stream like the agent's own transports."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read(self, size: int) -> bytes:
        return self._connection.recv(size)

    def write(self, data: bytes) -> None:
        self._connection.sendall(data)


def agree(method: str) -> Callable[[Any, Any], Any]:
    reply = METHODS[SERVICE][method][1]

    def handle(request: Any, call: Any) -> Any:
        if method == "WaitProcess":
            call.wait(readable=())
        if method == "StatsContainer":
            raise AgentError("refused")
        return CODEC.new(reply)

    return handle


SERVER = Server(CODEC, methods=METHODS, handlers={method: agree(method) for method in METHODS[SERVICE]})

bodies = st.sampled_from(sorted(METHODS[SERVICE])).flatmap(
    lambda method: st.builds(
        encode_request,
        st.sampled_from([1, 2, 3, 5, 7]),
        service=st.sampled_from([SERVICE, SERVICE, "no.Service"]),
        method=st.sampled_from([method, method, "NoMethod"]),
        payload=st.one_of(st.binary(max_size=30), st.just(b"")),
        timeout_nano=st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.just(0)),
        metadata=st.just({}),
    )
)
frames = st.builds(
    encode_frame,
    st.integers(0, 9),
    st.sampled_from(list(FrameType)),
    st.binary(max_size=30),
)
streams = st.lists(st.one_of(bodies, frames), min_size=1, max_size=5).map(b"".join)


@settings(max_examples=2 * CASES)
@given(stream=st.one_of(streams, bent(streams), st.binary(max_size=60)))
@example(stream=header(0xFFFF_FFFF) + b"x")
@example(
    stream=encode_request(
        1, service=SERVICE, method="WaitProcess", payload=b"", timeout_nano=(1 << 63) - 1, metadata={}
    )
)
def test_any_stream_is_answered_or_ended(stream: Any) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(WITHIN_S)
    serving = threading.Thread(target=Connection(OverSocket(theirs), SERVER).serve)
    serving.start()
    ours.sendall(stream)
    ours.shutdown(socket.SHUT_WR)
    serving.join(WITHIN_S)
    assert not serving.is_alive()
    theirs.shutdown(socket.SHUT_WR)
    received = b""
    while data := ours.recv(65536):
        received += data
    for frame in FrameDecoder().feed(received):
        assert isinstance(frame, Frame)
        status = ttrpc_pb2.Response.FromString(frame.body).status
        assert "defect in the agent" not in status.message
    ours.close()
    theirs.close()

"""Any bytes on a ttrpc connection get an answer, a refusal or a hang-up; other connections go on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import example, given
from hypothesis import strategies as st

from proto import ttrpc_pb2
from proto.containerd import task_v3_pb2
from shim.transport.ttrpc_codec import (
    MAX_BODY,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    OversizedFrame,
    encode_frame,
    encode_request,
)
from tests.fuzz.material import bent, messages
from tests.fuzz.peers import MIB, TASK, assert_contract, header

if TYPE_CHECKING:
    from typing import Any


_METHODS = ("State", "Pids", "Kill", "Stats", "Connect", "CloseIO", "ResizePty", "NoSuchMethod")

requests = st.builds(
    encode_request,
    st.sampled_from([1, 3, 5, 7, 2, 0, 0xFFFF_FFFF]),
    service=st.sampled_from([TASK, "containerd.task.v2.Task", "no.such.Service", ""]),
    method=st.sampled_from(_METHODS),
    payload=messages(task_v3_pb2.DESCRIPTOR.message_types_by_name["StateRequest"]).map(
        lambda message: message.SerializeToString()
    ),
    timeout_nano=st.integers(-(1 << 63), (1 << 63) - 1),
    metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)
frames = st.builds(
    lambda stream_id, kind, body, flags: encode_frame(stream_id, kind, body, flags=flags),
    st.integers(0, 0xFFFF_FFFF),
    st.sampled_from(list(FrameType)),
    st.binary(max_size=40),
    flags=st.integers(0, 255),
)
streams = st.lists(st.one_of(requests, frames), min_size=1, max_size=6).map(b"".join)
hostile = st.one_of(st.binary(max_size=200), streams, bent(streams))


@given(stream=hostile, cuts=st.lists(st.integers(0, 400), max_size=8))
def test_the_decoder_yields_frames_or_refuses_and_buffers_little(stream: Any, cuts: Any) -> None:
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    decoder = FrameDecoder()
    try:
        for start, end in itertools.pairwise(edges):
            for frame in decoder.feed(stream[start:end]):
                assert isinstance(frame, Frame | OversizedFrame)
            assert decoder.buffered <= end
    except FrameError as error:
        assert str(error).isprintable()  # noqa: PT017 - a refusal is one of the two right outcomes


@given(stream=hostile)
@example(stream=header(MAX_BODY + 1) + b"x")
@example(stream=header(0, kind=2))
def test_a_server_answers_by_the_contract_and_serves_the_next_client(shim: Any, stream: Any) -> None:
    with shim.connect() as peer:
        for frame in peer.say(stream):
            assert frame.kind is FrameType.RESPONSE
            status = ttrpc_pb2.Response.FromString(frame.body).status
            assert_contract(status.code, status.message)
        shim.assert_serves()


def test_announced_lengths_cost_no_memory(shim: Any) -> None:
    shim.assert_serves()
    before = shim.memory_bytes()
    peers = [shim.connect() for _ in range(50)]
    for length in (0xFFFF_FFFF, MAX_BODY):
        for peer in peers:
            peer.say(header(length) + bytes(100))
    shim.assert_serves()
    grown = shim.memory_bytes() - before
    for peer in peers:
        peer.socket.close()
    assert grown < 16 * MIB

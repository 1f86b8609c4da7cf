"""The ttrpc wire format, byte for byte."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import ttrpc_pb2
from shim.errors import ResourceExhausted
from shim.transport.ttrpc_codec import (
    MAX_BODY,
    Frame,
    FrameDecoder,
    FrameError,
    FrameType,
    OversizedFrame,
    encode_error,
    encode_frame,
    encode_request,
    encode_response,
)

FRAMES = st.builds(
    Frame,
    stream_id=st.integers(0, 0xFFFF_FFFF),
    kind=st.sampled_from(FrameType),
    flags=st.integers(0, 255),
    body=st.binary(max_size=40),
)


def encode(frame: Frame) -> bytes:
    return encode_frame(frame.stream_id, frame.kind, frame.body, flags=frame.flags)


def test_a_request_is_a_big_endian_header_and_the_message() -> None:
    frame = encode_request(
        5, service="grpc.Health", method="Check", payload=b"\x01", timeout_nano=7, metadata={"key": "value"}
    )
    body = ttrpc_pb2.Request(
        service="grpc.Health",
        method="Check",
        payload=b"\x01",
        timeout_nano=7,
        metadata=[ttrpc_pb2.KeyValue(key="key", value="value")],
    ).SerializeToString()
    assert frame == bytes([0, 0, 0, len(body), 0, 0, 0, 5, 1, 0]) + body


def test_a_success_has_a_payload_and_no_status() -> None:
    assert encode_response(3, b"ab") == bytes([0, 0, 0, 4, 0, 0, 0, 3, 2, 0]) + b"\x12\x02ab"


def test_a_failure_has_a_status_and_no_payload() -> None:
    assert (
        encode_error(3, code=5, message="no")
        == bytes([0, 0, 0, 8, 0, 0, 0, 3, 2, 0]) + b"\x0a\x06\x08\x05\x12\x02no"
    )


def test_the_longest_body_is_four_mebibytes() -> None:
    assert len(encode_frame(1, FrameType.DATA, bytes(MAX_BODY))) == 10 + (4 << 20)
    with pytest.raises(ResourceExhausted, match="4194305 bytes"):
        encode_frame(1, FrameType.DATA, bytes(MAX_BODY + 1))


@given(frames=st.lists(FRAMES, max_size=8), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_frames_are_decoded_from_any_pieces(frames: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(map(encode, frames))
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    decoder = FrameDecoder()
    seen = [frame for start, end in itertools.pairwise(edges) for frame in decoder.feed(stream[start:end])]
    assert seen == frames
    assert decoder.buffered == 0


def test_every_two_way_split_of_a_stream_gives_the_same_frames() -> None:
    frames = [
        Frame(1, FrameType.REQUEST, 0, b"body"),
        Frame(3, FrameType.DATA, 7, b""),
        Frame(5, FrameType.RESPONSE, 0, b"x"),
    ]
    stream = b"".join(map(encode, frames))
    for cut in range(len(stream) + 1):
        decoder = FrameDecoder()
        assert decoder.feed(stream[:cut]) + decoder.feed(stream[cut:]) == frames


def test_a_stream_may_come_byte_by_byte() -> None:
    frame = Frame(9, FrameType.REQUEST, 0, b"twelve bytes")
    decoder = FrameDecoder()
    assert [seen for byte in encode(frame) for seen in decoder.feed(bytes([byte]))] == [frame]


@pytest.mark.parametrize("chunk", [1 << 16, (4 << 20) + 7, 1 << 30], ids=["small", "odd", "whole"])
def test_an_oversized_body_is_skipped_and_reported_once(chunk: int) -> None:
    length = MAX_BODY + 1
    after = Frame(3, FrameType.REQUEST, 0, b"next")
    stream = struct.pack(">IIBB", length, 1, 1, 0) + bytes(length) + encode(after)
    decoder = FrameDecoder()
    seen = []
    for start in range(0, len(stream), chunk):
        seen += decoder.feed(stream[start : start + chunk])
        assert decoder.buffered < 32
    assert seen == [OversizedFrame(1, FrameType.REQUEST, length), after]


@pytest.mark.parametrize("type_number", [0, 4, 255])
def test_an_unknown_message_type_is_not_ttrpc(type_number: int) -> None:
    with pytest.raises(FrameError, match=f"type {type_number} "):
        FrameDecoder().feed(struct.pack(">IIBB", 0, 1, type_number, 0))


@given(chunks=st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_are_either_frames_or_not_ttrpc(chunks: list[bytes]) -> None:
    decoder = FrameDecoder()
    fed = 0
    try:
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                assert frame.kind in FrameType
            fed += len(chunk)
            assert decoder.buffered <= fed
    except FrameError as error:
        assert "message type" in str(error)  # noqa: PT017 - a refusal is one of the two right outcomes

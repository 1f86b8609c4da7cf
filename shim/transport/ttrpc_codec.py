"""The ttrpc wire format as values: bytes in, frames out, and back. No I/O.

A frame is a header of ten bytes, big endian (length of the body, stream id, message type, flags), and then
the body. The rules are those of containerd's ttrpc, version 1.2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from proto import ttrpc_pb2
from shim.errors import ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BODY = 4 << 20
"""Longest body of a frame, in bytes; longer ones are refused in both directions."""

MAX_STREAM_ID = 0xFFFF_FFFF

_HEADER = struct.Struct(">IIBB")


class FrameType(IntEnum):
    """The content of a frame."""

    REQUEST = 1
    RESPONSE = 2
    DATA = 3


_TYPES = {int(kind): kind for kind in FrameType}


class FrameError(Exception):
    """The peer does not speak ttrpc; no later byte can be trusted."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole frame; its flags are those of a stream, and 0 for a request or a response without one."""

    stream_id: int
    kind: FrameType
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class OversizedFrame:
    """A frame whose body is over the limit and is skipped; ``length`` is the announced one, in bytes."""

    stream_id: int
    kind: FrameType
    length: int


class FrameDecoder:
    """Cuts a byte stream into frames, holding back at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._to_skip = 0

    @property
    def buffered(self) -> int:
        """Bytes held back until the rest of their frame arrives."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame | OversizedFrame]:
        """Add the next bytes of the stream.

        :param data: any number of bytes, cut anywhere.
        :returns: the frames that are now complete, in order; an oversized one appears with its header.
        :raises FrameError: if a header names an unknown message type; the decoder is of no further use.
        """
        skipped = min(self._to_skip, len(data))
        self._to_skip -= skipped
        buffer = self._buffer
        buffer += memoryview(data)[skipped:]
        frames: list[Frame | OversizedFrame] = []
        position = 0
        while len(buffer) - position >= _HEADER.size:
            length, stream_id, type_number, flags = _HEADER.unpack_from(buffer, position)
            kind = _TYPES.get(type_number)
            if kind is None:
                raise FrameError(f"message type {type_number} is not part of ttrpc")
            body_start = position + _HEADER.size
            body_end = body_start + length
            if length > MAX_BODY:
                frames.append(OversizedFrame(stream_id, kind, length))
                position = min(body_end, len(buffer))
                self._to_skip = body_end - position
            elif body_end <= len(buffer):
                frames.append(Frame(stream_id, kind, flags, bytes(buffer[body_start:body_end])))
                position = body_end
            else:
                break
        del buffer[:position]
        return frames


def encode_frame(stream_id: int, kind: FrameType, body: bytes, *, flags: int = 0) -> bytes:
    """Put a header before a body.

    :raises ResourceExhausted: if the body is longer than :data:`MAX_BODY`.
    """
    if len(body) > MAX_BODY:
        raise ResourceExhausted(
            f"ttrpc: message of {len(body)} bytes exceeds the limit of {MAX_BODY}; send less"
        )
    return _HEADER.pack(len(body), stream_id, kind, flags) + body


def encode_request(
    stream_id: int,
    *,
    service: str,
    method: str,
    payload: bytes,
    timeout_nano: int,
    metadata: Mapping[str, str],
) -> bytes:
    """Build the frame of a call that is not streamed.

    :param timeout_nano: how long the server may take, in nanoseconds; 0 for no limit.
    :raises ResourceExhausted: if the message is over the limit.
    """
    request = ttrpc_pb2.Request(
        service=service,
        method=method,
        payload=payload,
        timeout_nano=timeout_nano,
        metadata=[ttrpc_pb2.KeyValue(key=key, value=value) for key, value in metadata.items()],
    )
    return encode_frame(stream_id, FrameType.REQUEST, request.SerializeToString())


def encode_response(stream_id: int, payload: bytes) -> bytes:
    """Build the frame of a successful answer, which has no status.

    :raises ResourceExhausted: if the message is over the limit.
    """
    return encode_frame(
        stream_id, FrameType.RESPONSE, ttrpc_pb2.Response(payload=payload).SerializeToString()
    )


def encode_error(stream_id: int, *, code: int, message: str) -> bytes:
    """Build the frame of a failed answer: a status and no payload, as Go clients decode the payload first.

    :raises ResourceExhausted: if the message is over the limit.
    """
    response = ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=message))
    return encode_frame(stream_id, FrameType.RESPONSE, response.SerializeToString())

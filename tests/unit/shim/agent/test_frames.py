"""A framed stream is decoded correctly, in any pieces and from either side."""

from __future__ import annotations

import random

import pytest

from shim.agent.frames import END, WORD, StreamFrameError, Unframer, framed

DATA = random.Random(1).randbytes(100_000)  # noqa: S311 - repeatable, not secret


def unframe(pieces: list[bytes]) -> tuple[bytes, bool]:
    unframer = Unframer()
    carried = b"".join(bytes(part) for piece in pieces for part in unframer.feed(piece))
    return carried, unframer.ended


@pytest.mark.parametrize("piece", [1, 3, 4, 5, 4096, 1 << 20])
@pytest.mark.parametrize("frame", [1, 7, 1000, 65_536])
def test_a_stream_may_arrive_in_any_pieces(piece: int, frame: int) -> None:
    stream = b"".join(framed(DATA[at : at + frame]) for at in range(0, len(DATA), frame)) + END
    pieces = [stream[at : at + piece] for at in range(0, len(stream), piece)]
    assert unframe(pieces) == (DATA, True)


def test_an_end_without_data_is_an_empty_stream() -> None:
    assert unframe([END]) == (b"", True)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_stream_without_its_end_has_not_ended(cut: int) -> None:
    assert not unframe([framed(b"abc")[:cut]])[1]


def test_a_frame_of_any_size_is_passed_on_without_being_kept() -> None:
    unframer = Unframer()
    assert b"".join(unframer.feed(WORD.pack(0xFFFFFFFF))) == b""
    for _ in range(3):
        assert b"".join(unframer.feed(DATA)) == DATA
    assert not unframer.ended


def test_bytes_after_the_end_of_a_stream_are_refused() -> None:
    unframer = Unframer()
    assert list(unframer.feed(END)) == []
    with pytest.raises(StreamFrameError, match="3 bytes after the end"):
        list(unframer.feed(b"abc"))


def test_bytes_before_a_framing_error_are_not_lost() -> None:
    parts = Unframer().feed(framed(b"abc") + END + b"d")
    assert bytes(next(parts)) == b"abc"
    with pytest.raises(StreamFrameError):
        next(parts)

"""A sealed file gives back the memory that went in, and nothing if it was changed."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor import sealed_memory
from hypervisor.sealed_memory import FileLostError, Range

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE = 4096
MIB = 1 << 20


class InvalidTagError(Exception):
    """As the library's."""


class Hmac:
    """A cipher of the right shape that hides nothing: the real one is tested where machines are parked."""

    def encrypt(self, nonce: bytes, data: bytes, _associated_data: bytes | None) -> bytes:
        return data + self._tag(nonce, data)

    def decrypt(self, nonce: bytes, data: bytes, _associated_data: bytes | None) -> bytes:
        plain, tag = data[:-16], data[-16:]
        if not hmac.compare_digest(tag, self._tag(nonce, plain)):
            raise InvalidTagError
        return plain

    def _tag(self, nonce: bytes, data: bytes) -> bytes:
        return hmac.digest(b"key", nonce + data, hashlib.sha256)[:16]


def memory_of(pages: bytes) -> int:
    descriptor = os.memfd_create("memory")
    os.write(descriptor, pages)
    return descriptor


def sealed(memories: list[int], ranges: Iterable[Range]) -> bytes:
    return b"".join(sealed_memory.seal(sealed_memory.records(ranges, memories), Hmac()))


def unsealed(file: bytes) -> dict[tuple[int, int], bytes]:
    descriptor = memory_of(file)
    try:
        return {
            (place.memory, place.offset): pages
            for plain in sealed_memory.unseal(descriptor, Hmac(), invalid=InvalidTagError)
            for place, pages in sealed_memory.runs_of(plain)
        }
    finally:
        os.close(descriptor)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0, 0, 1, 2]), max_size=700), st.integers(0, 700))
def test_memory_comes_back_as_it_was(marks: list[int], split: int) -> None:
    pages = b"".join(bytes([mark]) * PAGE for mark in marks)
    memories = [memory_of(pages[: split * PAGE]), memory_of(pages[split * PAGE :])]
    ranges = [Range(number, 0, os.fstat(each).st_size) for number, each in enumerate(memories)]
    try:
        file = sealed(memories, ranges)
    finally:
        for each in memories:
            os.close(each)

    found = [bytearray(each.length) for each in ranges]
    for (memory, offset), run in unsealed(file).items():
        found[memory][offset : offset + len(run)] = run

    assert b"".join(found) == pages
    assert len(file) <= sealed_memory.room(ranges)


def test_pages_of_zeros_are_left_out() -> None:
    memory = memory_of(b"a" * PAGE + bytes(MIB) + b"b" * PAGE)
    try:
        file = sealed([memory], [Range(0, 0, MIB + 2 * PAGE)])
    finally:
        os.close(memory)

    assert len(file) < 3 * PAGE
    assert sorted(unsealed(file)) == [(0, 0), (0, MIB + PAGE)]


@pytest.fixture
def file() -> bytes:
    """A file of three records and the last, empty one."""
    memory = memory_of(os.urandom(3 * MIB))
    try:
        return sealed([memory], [Range(0, 0, 3 * MIB)])
    finally:
        os.close(memory)


def records_of(file: bytes) -> list[bytes]:
    found = []
    while file:
        length = 4 + int.from_bytes(file[:4], "little")
        found.append(file[:length])
        file = file[length:]
    return found


def test_a_changed_byte_is_found(file: bytes) -> None:
    changed = bytearray(file)
    changed[MIB + 1000] ^= 1

    with pytest.raises(FileLostError, match="record 1: not what was written"):
        unsealed(bytes(changed))


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [0, 0, 1, 2, 3], [0, 2, 3], [3]], ids=str)
def test_records_in_another_order_are_found(file: bytes, order: list[int]) -> None:
    records = records_of(file)
    assert len(records) == 4

    with pytest.raises(FileLostError, match="not what was written"):
        unsealed(b"".join(records[number] for number in order))


@pytest.mark.parametrize("length", [0, 3, 100, MIB, -1, -30])
def test_a_file_that_was_cut_off_is_found(file: bytes, length: int) -> None:
    with pytest.raises(FileLostError):
        unsealed(file[:length])


def test_a_length_that_no_record_has_is_not_read(file: bytes) -> None:
    with pytest.raises(FileLostError, match="too long"):
        unsealed(b"\xff\xff\xff\xff" + file[4:])


def test_an_order_is_read_as_it_was_written() -> None:
    ranges = [Range(0, 0, PAGE), Range(1, 1 << 40, 1 << 33)]

    text = sealed_memory.order(b"k" * sealed_memory.KEY_BYTES, ranges)

    assert sealed_memory.read_order(text) == (b"k" * sealed_memory.KEY_BYTES, ranges)

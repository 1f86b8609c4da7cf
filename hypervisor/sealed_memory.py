"""Moves a guest's memory to a sealed file, and back. It is a program, so the machine's cgroup is charged.

    sealed_memory.py seal|unseal PACKAGES FILE ORDER MEMORY...

PACKAGES is the directory of Python's packages; the others are descriptors. ORDER has the key, then the ranges
of each MEMORY that have data. The process ends soon, and its libraries stay out of the shim's memory.

The file is a sequence of records, each sealed by AES-256-GCM: where its pages belong, then the pages. The
nonce of a record is its number, so none can be left out, repeated or moved; the last one is empty, so none
can be cut off. No two files have the same key. Pages of zeros are left out: a hole reads as zeros.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Protocol

    class Cipher(Protocol):
        """Encrypts with a key."""

        def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
            """Return the ciphertext and its tag."""

        def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
            """Return the plaintext.

            :raises InvalidTag: if it is not what was encrypted.
            """


KEY_BYTES = 32
LOST = 3
"""The exit status if the file is not what was written."""

_PAGE = 4096
_ZEROS = bytes(_PAGE)
_NONCE_BYTES, _TAG_BYTES = 12, 16
_LENGTH = struct.Struct("<I")  # of a sealed record
_COUNT = struct.Struct("<I")  # of the runs in a record
_RUN = struct.Struct("<IQI")  # the memory's number, offset, length
_RANGE = struct.Struct("<IQQ")
_RECORD_BYTES = 1 << 20  # of pages in a record
_MOST_SEALED = _COUNT.size + _RECORD_BYTES + _RECORD_BYTES // _PAGE * _RUN.size + _TAG_BYTES


class Range(NamedTuple):
    """A part of a guest's memory.

    :param memory: the number of the memory, from 0.
    :param offset: its beginning, in bytes.
    :param length: its length, in bytes.
    """

    memory: int
    offset: int
    length: int


class FileLostError(Exception):
    """A sealed file is not what was written."""


def room(ranges: Iterable[Range]) -> int:
    """Return how long a file with these ranges may be, in bytes."""
    total = sum(each.length for each in ranges)
    records = total // _RECORD_BYTES + 2
    return total + total // _PAGE * _RUN.size + records * (_LENGTH.size + _COUNT.size + _TAG_BYTES)


def order(key: bytes, ranges: Iterable[Range]) -> bytes:
    """Encode the content of ORDER."""
    return key + b"".join(_RANGE.pack(*each) for each in ranges)


def read_order(text: bytes) -> tuple[bytes, list[Range]]:
    """Decode the content of ORDER."""
    return text[:KEY_BYTES], [Range(*each) for each in _RANGE.iter_unpack(text[KEY_BYTES:])]


def pieces(ranges: Iterable[Range]) -> Iterator[Range]:
    """Split ranges so that none is longer than a record."""
    for memory, offset, length in ranges:
        for begin in range(0, length, _RECORD_BYTES):
            yield Range(memory, offset + begin, min(length - begin, _RECORD_BYTES))


def used_runs(pages: bytes) -> Iterator[tuple[int, int]]:
    """List the runs of memory that are not zero.

    :param pages: whole pages.
    :returns: offset and end of each run of such pages, in bytes.
    """
    start = None
    for offset in range(0, len(pages), _PAGE):
        is_used = pages[offset : offset + _PAGE] != _ZEROS
        if is_used and start is None:
            start = offset
        elif not is_used and start is not None:
            yield start, offset
            start = None
    if start is not None:
        yield start, len(pages)


def record(runs: Iterable[tuple[Range, bytes]]) -> bytes:
    """Join runs of pages to the plaintext of a record."""
    runs = list(runs)
    head = b"".join(_RUN.pack(*place) for place, _ in runs)
    return b"".join((_COUNT.pack(len(runs)), head, *(pages for _, pages in runs)))


def runs_of(plain: bytes) -> list[tuple[Range, bytes]]:
    """Split the plaintext of a record."""
    (count,) = _COUNT.unpack_from(plain)
    begin = _COUNT.size + count * _RUN.size
    found = []
    for place in map(Range._make, _RUN.iter_unpack(plain[_COUNT.size : begin])):
        found.append((place, plain[begin : begin + place.length]))
        begin += place.length
    return found


def records(ranges: Iterable[Range], memories: list[int]) -> Iterator[bytes]:
    """Read guest memory into the plaintexts of records, including the empty last one.

    :param ranges: the ranges that have data.
    :param memories: the descriptors of its memories.
    :raises OSError: if it cannot be read.
    """
    runs: list[tuple[Range, bytes]] = []
    held = 0
    for memory, offset, length in pieces(ranges):
        pages = os.pread(memories[memory], length, offset)
        if held + length > _RECORD_BYTES and runs:
            yield record(runs)
            runs, held = [], 0
        for begin, end in used_runs(pages):
            runs.append((Range(memory, offset + begin, end - begin), pages[begin:end]))
            held += end - begin
    if runs:
        yield record(runs)
    yield record([])


def seal(plaintexts: Iterable[bytes], cipher: Cipher) -> Iterator[bytes]:
    """Seal records, each after its length."""
    for number, plain in enumerate(plaintexts):
        sealed = cipher.encrypt(_nonce(number), plain, None)
        yield _LENGTH.pack(len(sealed)) + sealed


def unseal(file: int, cipher: Cipher, *, invalid: type[Exception]) -> Iterator[bytes]:
    """Read the records of a file up to the last.

    :param file: its descriptor.
    :param invalid: what the cipher raises.
    :raises FileLostError: if the file is not what was written.
    """
    number = offset = 0
    while True:
        try:
            (length,) = _LENGTH.unpack(os.pread(file, _LENGTH.size, offset))
            if length > _MOST_SEALED:
                raise FileLostError(f"record {number}: too long")
            plain = cipher.decrypt(_nonce(number), os.pread(file, length, offset + _LENGTH.size), None)
        except (struct.error, ValueError, OSError) as error:
            raise FileLostError(f"record {number}: {error}") from error
        except invalid as error:
            raise FileLostError(f"record {number}: not what was written") from error
        if not _COUNT.unpack_from(plain)[0]:
            return
        yield plain
        offset += _LENGTH.size + length
        number += 1


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE_BYTES, "big")


def _seal_file(file: int, ranges: list[Range], memories: list[int], cipher: Cipher) -> None:
    os.posix_fallocate(file, 0, room(ranges))
    written = 0
    for sealed in seal(records(ranges, memories), cipher):
        view = memoryview(sealed)
        while view:
            count = os.pwrite(file, view, written)
            view, written = view[count:], written + count
    os.ftruncate(file, written)
    # On the disk now, not in the host's memory instead of the guest's.
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    print(written)


def _unseal_file(file: int, memories: list[int], cipher: Cipher, invalid: type[Exception]) -> None:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    for plain in unseal(file, cipher, invalid=invalid):
        for place, pages in runs_of(plain):
            if os.pwrite(memories[place.memory], pages, place.offset) != place.length:
                raise OSError(0, "written in part")


def _main() -> None:
    what, packages, *descriptors = sys.argv[1:]
    file, ordered, *memories = map(int, descriptors)
    sys.path.append(packages)
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - only the program needs it
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

    key, ranges = read_order(os.pread(ordered, os.fstat(ordered).st_size, 0))
    try:
        if what == "seal":
            _seal_file(file, ranges, memories, AESGCM(key))
        else:
            _unseal_file(file, memories, AESGCM(key), InvalidTag)
    except FileLostError as error:
        print(error)
        sys.exit(LOST)
    except OSError as error:
        sys.exit(error.strerror)


if __name__ == "__main__":
    _main()

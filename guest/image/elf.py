"""Reads and edits the parts of ELF files that matter here: libraries, interpreter, notes, sections."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest.image.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE = 1, 2, 3, 4
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5
DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
XEN_ELFNOTE_PHYS32_ENTRY = 18
"""Note type of the PVH entry point (Xen's public/elfnote.h); the note's name is ``Xen``."""

_HEADER_SIZE = 64
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NAME, _KIND, _OFFSET, _SIZE, _ALIGN = 0, 1, 4, 5, 8
_SHT_PROGBITS, _SHT_NOBITS = 1, 8
_SYMBOL_SIZE, _STB_WEAK, _VER_NDX_GLOBAL = 24, 2, 1


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int
    align: int


@dataclass(frozen=True, slots=True)
class Elf:
    """A 64-bit little-endian ELF image held in memory.

    :param data: the whole file.
    :param segments: its program headers.
    """

    data: bytes
    segments: tuple[_Segment, ...]

    @property
    def interpreter(self) -> str | None:
        """The dynamic loader the image asks for, or None for a static image."""
        for segment in self.segments:
            if segment.kind == PT_INTERP:
                return self.data[segment.offset : segment.offset + segment.size].rstrip(b"\0").decode()
        return None

    @property
    def needed(self) -> tuple[str, ...]:
        """The sonames of the DT_NEEDED entries, in order."""
        names, strings = [], None
        for segment in self.segments:
            if segment.kind != PT_DYNAMIC:
                continue
            for tag, value in struct.iter_unpack(
                "<qQ", self.data[segment.offset : segment.offset + segment.size // 16 * 16]
            ):
                if tag == DT_NULL:
                    break
                if tag == DT_NEEDED:
                    names.append(value)
                elif tag == DT_STRTAB:
                    strings = self._file_offset(value)
        if strings is None:
            return ()
        return tuple(self._string(strings + name) for name in names)

    @property
    def has_pvh_entry(self) -> bool:
        """Whether the image carries the PVH entry note, without which QEMU cannot start it directly."""
        for segment in self.segments:
            if segment.kind != PT_NOTE:
                continue
            padding = max(segment.align, 4)
            position, end = segment.offset, segment.offset + segment.size
            while position + 12 <= end:
                name_size, value_size, kind = struct.unpack_from("<III", self.data, position)
                name = self.data[position + 12 : position + 12 + name_size].rstrip(b"\0")
                if name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY:
                    return True
                position += 12 + _aligned(name_size, padding)
                position += _aligned(value_size, padding)
        return False

    def section(self, wanted: str) -> bytes:
        """Return the bytes of a section.

        :param wanted: the section's name, for example ``.modinfo``.
        :returns: its bytes; empty when there is no such section.
        """
        offset, length = sections(self.data).get(wanted, (0, 0))
        return self.data[offset : offset + length]

    def _file_offset(self, address: int) -> int:
        for segment in self.segments:
            if segment.kind == PT_LOAD and segment.address <= address < segment.address + segment.size:
                return segment.offset + address - segment.address
        raise ImageError(f"image: ELF: address {address:#x} lies in no segment; the file is damaged")

    def _string(self, offset: int) -> str:
        return _text(self.data, offset)


def _aligned(size: int, padding: int) -> int:
    return (size + padding - 1) // padding * padding


def parse(data: bytes, *, name: str) -> Elf:
    """Parse an ELF image.

    :param data: the whole file.
    :param name: what to call it in an error.
    :returns: the parsed image.
    :raises ImageError: if it is not a 64-bit little-endian ELF file.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise ImageError(f"image: {name}: not a 64-bit little-endian ELF file; use x86_64 packages")
    offset, size, count = (
        struct.unpack_from("<Q", data, 0x20)[0],
        *struct.unpack_from("<HH", data, 0x36),
    )
    segments = []
    for index in range(count):
        kind, _flags, at, address, _physical, file_size, _memory_size, align = struct.unpack_from(
            "<IIQQQQQQ", data, offset + index * size
        )
        segments.append(_Segment(kind=kind, offset=at, address=address, size=file_size, align=align))
    return Elf(data=data, segments=tuple(segments))


def slim_module(data: bytes, unwanted: Iterable[str]) -> bytes:
    """Remove sections from a relocatable object, with their relocations and all bytes after the object.

    Symbols and relocations refer to sections by number, so each section keeps its number: a removed one
    stays as an empty section without a name.

    :param data: the whole file.
    :param unwanted: names of sections.
    :returns: the object without them.
    """
    table = struct.unpack_from("<Q", data, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [list(_SECTION.unpack_from(data, table + size * index)) for index in range(count)]
    names = headers[names_index][_OFFSET]
    gone = {wanted.encode() + b"\0" for name in unwanted for wanted in (name, f".rela{name}")}
    parts, end = [data[:_HEADER_SIZE]], _HEADER_SIZE
    for header in headers[1:]:
        offset, length = header[_OFFSET], header[_SIZE]
        name = data[names + header[_NAME] : data.index(b"\0", names + header[_NAME]) + 1]
        if name in gone:
            header[:] = [0, _SHT_PROGBITS, 0, 0, end, 0, 0, 0, 1, 0]
            continue
        padding = -end % max(header[_ALIGN], 1)
        header[_OFFSET] = end + padding
        if header[_KIND] != _SHT_NOBITS:
            parts += [bytes(padding), data[offset : offset + length]]
            end += padding + length
    parts.append(bytes(-end % 8))
    end += -end % 8
    parts += [_SECTION.pack(*header) for header in headers]
    whole = bytearray(b"".join(parts))
    struct.pack_into("<Q", whole, 0x28, end)
    return bytes(whole)


def without_library(data: bytes, soname: str) -> bytes:
    """Free a program from a shared library that it never calls.

    The library and its symbols' versions are no longer listed as needed. The symbols become weak, so the
    loader need not find them.

    :param data: the whole file.
    :param soname: the library.
    :returns: the program; the same if it does not need the library.
    :raises ImageError: if it needs the library in a way that is not understood.
    """
    if soname not in parse(data, name=soname).needed:
        return data
    places = sections(data)
    missing = {".dynstr", ".dynamic", ".dynsym", ".gnu.version", ".gnu.version_r"} - places.keys()
    if missing:
        raise ImageError(f"image: ELF: no section {min(missing)}; {soname} cannot be taken out")
    file = bytearray(data)
    strings = places[".dynstr"][0]
    versions, skipped = _unlink_versions(file, places[".gnu.version_r"][0], strings, soname)
    symbols, size = places[".dynsym"]
    for index in range(size // _SYMBOL_SIZE):
        version = places[".gnu.version"][0] + 2 * index
        if struct.unpack_from("<H", file, version)[0] in versions:
            struct.pack_into("<H", file, version, _VER_NDX_GLOBAL)
            binding = symbols + _SYMBOL_SIZE * index + 4
            file[binding] = file[binding] & 0xF | _STB_WEAK << 4
    begin, size = places[".dynamic"]
    changed = {DT_VERNEED: skipped, DT_VERNEEDNUM: -1}
    kept = [
        (tag, value + changed.get(tag, 0))
        for tag, value in struct.iter_unpack("<qQ", data[begin : begin + size])
        if tag != DT_NEEDED or _text(data, strings + value) != soname
    ]
    for index, entry in enumerate([*kept, (DT_NULL, 0)]):
        struct.pack_into("<qQ", file, begin + 16 * index, *entry)
    return bytes(file)


def _unlink_versions(file: bytearray, needs: int, strings: int, soname: str) -> tuple[set[int], int]:
    """Remove a library's versions from the list of needed versions.

    :returns: the versions' numbers, and by how many bytes the list now begins later.
    """
    numbers: set[int] = set()
    before, entry, following = 0, needs, 1
    while following:
        _version, count, name, first, following = struct.unpack_from("<HHIII", file, entry)
        if _text(file, strings + name) == soname:
            version = entry + first
            for _ in range(count):
                _hash, _flags, number, _name, step = struct.unpack_from("<IHHII", file, version)
                numbers.add(number)
                version += step
            if not before:
                return numbers, following
            struct.pack_into("<I", file, before + 12, following and entry + following - before)
            return numbers, 0
        before, entry = entry, entry + following
    return numbers, 0


def _text(data: bytes | bytearray, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


def sections(data: bytes) -> dict[str, tuple[int, int]]:
    """Find the sections of an ELF image.

    :param data: the whole file.
    :returns: each one's place in the file and its length, in bytes, by its name.
    """
    table = struct.unpack_from("<Q", data, 0x28)[0]
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [_SECTION.unpack_from(data, table + size * index) for index in range(count)]
    names = headers[names_index][_OFFSET]
    return {_text(data, names + header[_NAME]): (header[_OFFSET], header[_SIZE]) for header in headers}

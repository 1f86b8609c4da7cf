"""Process 1's first program: it executes another one at once, with arguments and an environment.

The kernel could also start a script, but the interpreter would have to compile it, which takes a tenth of its
start under emulation. Besides, only a program can set the environment.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_BASE = 0x400000
_HEADER_SIZE, _SEGMENT_SIZE = 64, 56
_EXECUTABLE, _X86_64, _LOAD, _ALL_ACCESS, _PAGE = 2, 62, 1, 7, 4096
_EXECVE = 59


def program(arguments: Sequence[str], environment: Sequence[str]) -> bytes:
    """Write an x86_64 program that executes another; if it cannot, it crashes, and the kernel panics.

    :param arguments: the other one's; the first is its path.
    :param environment: as ``NAME=VALUE``.
    :returns: a static ELF executable.
    """
    code_at = _BASE + _HEADER_SIZE + _SEGMENT_SIZE
    tables_at = code_at + len(_code(0, 0, 0))
    strings_at = tables_at + 8 * (len(arguments) + len(environment) + 2)
    strings, places = b"", []
    for text in (*arguments, *environment):
        places.append(strings_at + len(strings))
        strings += text.encode() + b"\0"
    argv, envp = places[: len(arguments)], places[len(arguments) :]
    tables = struct.pack(f"<{len(places) + 2}Q", *argv, 0, *envp, 0)
    code = _code(argv[0], tables_at, tables_at + 8 * (len(argv) + 1))
    size = _HEADER_SIZE + _SEGMENT_SIZE + len(code) + len(tables) + len(strings)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH",
        *(_EXECUTABLE, _X86_64, 1, code_at, _HEADER_SIZE, 0, 0),
        *(_HEADER_SIZE, _SEGMENT_SIZE, 1, 0, 0, 0),
    )
    segment = struct.pack("<IIQQQQQQ", _LOAD, _ALL_ACCESS, 0, _BASE, _BASE, size, size, _PAGE)
    return header + segment + code + tables + strings


def _code(path: int, argv: int, envp: int) -> bytes:
    return (
        b"\xbf" + struct.pack("<I", path)       # mov edi, path
        + b"\xbe" + struct.pack("<I", argv)     # mov esi, argv
        + b"\xba" + struct.pack("<I", envp)     # mov edx, envp
        + b"\xb8" + struct.pack("<I", _EXECVE)  # mov eax, execve
        + b"\x0f\x05"                           # syscall
        + b"\x0f\x0b"                           # ud2
    )  # fmt: skip

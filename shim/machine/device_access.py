"""The devices that the processes in a cgroup may open: a list in version 1, a program in version 2.

They may make any device node: the virtio-fs daemon makes those of a guest's root file system, but opens none.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Number: TypeAlias = "tuple[int, int]"
"""A character device's major and minor number, as in the kernel's admin-guide/devices.txt."""

HARMLESS: tuple[Number, ...] = ((1, 3), (1, 5), (1, 8), (1, 9))
"""``/dev/null``, ``zero``, ``random`` and ``urandom``."""

KVM: Number = (10, 232)

_LIST = "devices.allow"

# From linux/bpf.h. Opcodes with a constant, except the load of a word.
_LOAD_WORD, _AND, _SHIFT_RIGHT, _MOVE, _EQUAL, _NOT_EQUAL, _EXIT = 0x61, 0x57, 0x77, 0xB7, 0x15, 0x55, 0x95
_RESULT, _CONTEXT, _KIND, _ACCESS, _MAJOR, _MINOR = 0, 1, 2, 3, 4, 5  # registers
_IS_CHARACTER, _READS_OR_WRITES = 2, 6
_CGROUP_DEVICE, _ALLOW_MULTI = 6, 2
_PROG_TYPE = 15
_PROG_LOAD, _PROG_ATTACH = 5, 8
_SYS_BPF = 321
_ATTRIBUTES = 128

_libc = ctypes.CDLL(None, use_errno=True)


def limit(directory: Path, allowed: Iterable[Number]) -> bool:
    """Let the processes in a cgroup open only some devices.

    :param directory: the cgroup's, of either version.
    :param allowed: the character devices; a block device is never one.
    :returns: whether this hierarchy can do that.
    :raises OSError: if the kernel refuses.
    """
    if (directory / _LIST).exists():
        (directory / "devices.deny").write_text("a", encoding="ascii")
        for line in ("b *:* m", "c *:* m", *(f"c {major}:{minor} rw" for major, minor in allowed)):
            (directory / _LIST).write_text(line, encoding="ascii")
        return True
    if (directory / "cgroup.controllers").exists():
        _attach(directory, program(allowed))
        return True
    return False


def program(allowed: Iterable[Number]) -> bytes:
    """Write the program by which the kernel decides on using a device (``struct bpf_cgroup_dev_ctx``).

    :param allowed: the character devices that may be used.
    """
    allow = _instruction(_MOVE, _RESULT, value=1) + _instruction(_EXIT)
    code = [
        _instruction(_LOAD_WORD, _ACCESS, source=_CONTEXT, offset=0),
        _instruction(_SHIFT_RIGHT, _ACCESS, value=16),
        _instruction(_AND, _ACCESS, value=_READS_OR_WRITES),
        _instruction(_NOT_EQUAL, _ACCESS, offset=2, value=0),
        allow,
        _instruction(_LOAD_WORD, _KIND, source=_CONTEXT, offset=0),
        _instruction(_AND, _KIND, value=0xFFFF),
        _instruction(_EQUAL, _KIND, offset=2, value=_IS_CHARACTER),
        _instruction(_MOVE, _RESULT, value=0),
        _instruction(_EXIT),
        _instruction(_LOAD_WORD, _MAJOR, source=_CONTEXT, offset=4),
        _instruction(_LOAD_WORD, _MINOR, source=_CONTEXT, offset=8),
    ]
    for major, minor in allowed:
        code.append(_instruction(_NOT_EQUAL, _MAJOR, offset=3, value=major))
        code.append(_instruction(_NOT_EQUAL, _MINOR, offset=2, value=minor))
        code.append(allow)
    code += [_instruction(_MOVE, _RESULT, value=0), _instruction(_EXIT)]
    return b"".join(code)


def _instruction(code: int, target: int = 0, *, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, target | source << 4, offset, value)


def _attach(directory: Path, code: bytes) -> None:
    text = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"MIT")
    # union bpf_attr: type, number of instructions, instructions, licence
    words = struct.pack(
        "=IIQQ", _PROG_TYPE, len(code) // 8, ctypes.addressof(text), ctypes.addressof(licence)
    )
    loaded = _bpf(_PROG_LOAD, words)
    try:
        cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The programs of the cgroups above apply, too.
            _bpf(_PROG_ATTACH, struct.pack("=IIII", cgroup, loaded, _CGROUP_DEVICE, _ALLOW_MULTI))
        finally:
            os.close(cgroup)
    finally:
        os.close(loaded)


def _bpf(command: int, attributes: bytes) -> int:
    result = int(
        _libc.syscall(_SYS_BPF, command, ctypes.create_string_buffer(attributes, _ATTRIBUTES), _ATTRIBUTES)
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "bpf")
    return result

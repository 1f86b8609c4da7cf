"""The devices that the processes in a cgroup may open: a list in version 1, a program in version 2.

They may make any device node: the virtio-fs daemon makes those of a guest's root file system, but opens none.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

log = logging.getLogger(__name__)

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
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH = 5, 8, 9
_SYS_BPF = 321
_ATTRIBUTES = 128

_libc = ctypes.CDLL(None, use_errno=True)


class DeviceAccess:
    """Which devices the processes in one cgroup may open: any, until some are allowed.

    :param directory: the cgroup's, of either version.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._allowed: dict[Number, None] = {}
        self._is_limited = False
        self._attached: int | None = None

    def allow(self, numbers: Iterable[Number]) -> bool:
        """Let the processes open more devices; from the first call on, they may open only allowed ones.

        :param numbers: character devices; a block device is never allowed.
        :returns: whether this hierarchy can limit devices.
        :raises OSError: if the kernel refuses.
        """
        more = [number for number in numbers if number not in self._allowed]
        if (self._directory / _LIST).exists():
            self._write_list(more)
        elif (self._directory / "cgroup.controllers").exists():
            # The new program first: until the old one is gone, both must agree.
            attached = _attach(self._directory, program([*self._allowed, *more]))
            old, self._attached = self._attached, attached
            if old is not None:
                _detach(self._directory, old)
        else:
            return False
        self._is_limited = True
        self._allowed.update(dict.fromkeys(more))
        return True

    def _write_list(self, more: Iterable[Number]) -> None:
        lines = [f"c {major}:{minor} rw" for major, minor in more]
        if not self._is_limited:
            (self._directory / "devices.deny").write_text("a", encoding="ascii")
            lines = ["b *:* m", "c *:* m", *lines]
        for line in lines:
            try:
                (self._directory / _LIST).write_text(line, encoding="ascii")
            except PermissionError:
                log.warning("cgroup: %s: %s: a cgroup above it forbids that", self._directory, line)


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


def _attach(directory: Path, code: bytes) -> int:
    """Attach a program to a cgroup; return it, open, as it is needed to detach it."""
    text = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"MIT")
    # union bpf_attr: type, number of instructions, instructions, licence
    words = struct.pack(
        "=IIQQ", _PROG_TYPE, len(code) // 8, ctypes.addressof(text), ctypes.addressof(licence)
    )
    loaded = _bpf(_PROG_LOAD, words)
    try:
        _with_cgroup(_PROG_ATTACH, directory, loaded)
    except BaseException:
        os.close(loaded)
        raise
    return loaded


def _detach(directory: Path, attached: int) -> None:
    try:
        _with_cgroup(_PROG_DETACH, directory, attached)
    finally:
        os.close(attached)


def _with_cgroup(command: int, directory: Path, loaded: int) -> None:
    cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # The programs of the cgroups above apply, too.
        flags = _ALLOW_MULTI if command == _PROG_ATTACH else 0
        _bpf(command, struct.pack("=IIII", cgroup, loaded, _CGROUP_DEVICE, flags))
    finally:
        os.close(cgroup)


def _bpf(command: int, attributes: bytes) -> int:
    result = int(
        _libc.syscall(_SYS_BPF, command, ctypes.create_string_buffer(attributes, _ATTRIBUTES), _ATTRIBUTES)
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "bpf")
    return result

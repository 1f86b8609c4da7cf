"""The processor time of threads that end, as Linux reports it (Documentation/accounting/taskstats.rst)."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_NETLINK_GENERIC, _CONTROL_FAMILY = 16, 16
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2
_GET, _REGISTER_CPUS, _DEREGISTER_CPUS = 1, 3, 4
_OF_A_THREAD, _PID, _STATS = 4, 1, 3
_HEADER, _GENERIC, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")
_TYPE_MASK = 0x3FFF
_COMMAND, _PARENT, _TIMES_US = 80, 132, 152
"""Offsets in ``struct taskstats``: the thread's name, its parent's id, its time in user and kernel mode."""

_RUN_NS = 72
"""The offset of the time it used, in nanoseconds; 0 unless the kernel accounts for delays."""

_DELAY_ACCOUNTING = Path("/proc/sys/kernel/task_delayacct")
_BUFFER = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A thread that has ended.

    :param pid: its id.
    :param parent: the id of its process's parent.
    :param name: its name, of at most 15 characters.
    :param used_s: the processor time it used, in seconds.
    """

    pid: int
    parent: int
    name: str
    used_s: float


class EndedThreads:
    """Reports each thread of the machine that ends within a ``with`` block.

    It must be made in the machine's first network namespace: the kernel sends reports only there.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._socket.settimeout(0)

    def __enter__(self) -> Self:
        """Ask the kernel for reports.

        :raises OSError: if the kernel refuses, or this process does not run as root.
        """
        self._usual = _DELAY_ACCOUNTING.read_bytes() if _DELAY_ACCOUNTING.exists() else b""
        if self._usual:
            _DELAY_ACCOUNTING.write_bytes(b"1")
        self._socket.bind((0, 0))
        self._send(_CONTROL_FAMILY, _GET_FAMILY, _FAMILY_NAME, b"TASKSTATS\0")
        answer = dict(_attributes(self._socket.recv(8192)[_HEADER.size + _GENERIC.size :]))
        self._family = int.from_bytes(answer[_FAMILY_ID][:2], "little")
        self._processors = f"0-{(os.cpu_count() or 1) - 1}\0".encode()
        self._send(self._family, _GET, _REGISTER_CPUS, self._processors)
        return self

    def __exit__(self, *_: object) -> None:
        """Ask the kernel to stop its reports."""
        self._send(self._family, _GET, _DEREGISTER_CPUS, self._processors)
        if self._usual:
            _DELAY_ACCOUNTING.write_bytes(self._usual)

    def read(self) -> Iterator[Ended]:
        """Yield the threads that have ended since the last call.

        :raises OSError: if more threads have ended than the socket could hold.
        """
        while True:
            try:
                message = self._socket.recv(65536)
            except BlockingIOError:
                return
            if _HEADER.unpack_from(message)[1] != self._family:
                continue
            for kind, value in _attributes(message[_HEADER.size + _GENERIC.size :]):
                if kind == _OF_A_THREAD:
                    yield _ended(dict(_attributes(value)))

    def _send(self, family: int, command: int, attribute: int, data: bytes) -> None:
        padded = data + bytes(-len(data) % 4)
        body = _GENERIC.pack(command, 1, 0) + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), attribute) + padded
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), family, 1, 1, 0) + body)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _ended(found: dict[int, bytes]) -> Ended:
    stats = found[_STATS]
    user_us, system_us = struct.unpack_from("=QQ", stats, _TIMES_US)
    [run_ns] = struct.unpack_from("=Q", stats, _RUN_NS)
    return Ended(
        pid=int.from_bytes(found[_PID][:4], "little"),
        parent=struct.unpack_from("=I", stats, _PARENT)[0],
        name=stats[_COMMAND : _COMMAND + 32].partition(b"\0")[0].decode(errors="replace"),
        used_s=run_ns / 1e9 or (user_us + system_us) / 1e6,
    )

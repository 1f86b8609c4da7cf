"""Make system calls in another process, as a guest that has taken it over could.

A traced thread is made to execute the instruction ``syscall`` that the kernel's own library (vDSO) has. See
ptrace(2) and syscall(2). Afterwards the thread goes on with what it did.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
from pathlib import Path
from typing import Self

from tests.patience import patient
from tests.waiting import until

_ATTACH, _DETACH, _GET_REGISTERS, _SET_REGISTERS, _SINGLE_STEP = 16, 17, 12, 13, 9
_WALL = 0x40000000  # waitpid(2): __WALL
_SYSCALL = b"\x0f\x05"
_BELOW_STACK = 4096
_STOPS_WITHIN_S = patient(10.0)
# Of struct user_regs_struct, sys/user.h.
_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_WORDS = ("rax", "rdi", "rsi", "rdx", "r10", "r8", "r9")

_libc = ctypes.CDLL(None, use_errno=True)


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _NAMES]


class Captive:
    """The main thread of a process, which stands still.

    :param pid: the process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._saved = _Registers()

    def __enter__(self) -> Self:
        self._trace(_ATTACH)
        self._wait()
        self._trace(_GET_REGISTERS, ctypes.byref(self._saved))
        self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)
        self._instruction = self._find_instruction()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._memory)
        with contextlib.suppress(ProcessLookupError):  # it was killed
            self._trace(_SET_REGISTERS, ctypes.byref(self._saved))
            self._trace(_DETACH)

    def call(self, *words: int | bytes) -> int:
        """Make a system call.

        :param words: its number, then its arguments: numbers, and bytes that are put into its memory.
        :returns: its result; a negative number is an error's.
        """
        registers = _Registers.from_buffer_copy(self._saved)
        free = (registers.rsp - _BELOW_STACK) & ~0xF
        registers.rsp = free - _BELOW_STACK
        for name, argument in zip(_WORDS, words, strict=False):
            if isinstance(argument, bytes):
                free -= (len(argument) + 16) & ~0xF
                os.pwrite(self._memory, argument + b"\0", free)
                setattr(registers, name, free)
            else:
                setattr(registers, name, argument & 0xFFFF_FFFF_FFFF_FFFF)
        registers.rip = self._instruction
        registers.orig_rax = 0xFFFF_FFFF_FFFF_FFFF  # no call is to be restarted
        self._trace(_SET_REGISTERS, ctypes.byref(registers))
        self._trace(_SINGLE_STEP)
        self._wait()
        self._trace(_GET_REGISTERS, ctypes.byref(registers))
        return ctypes.c_longlong(registers.rax).value

    def outcome(self, *words: int | bytes) -> str:
        """Make a system call and return ``done``, or the name of its error."""
        result = self.call(*words)
        return "done" if result >= 0 else errno.errorcode[-result]

    def _find_instruction(self) -> int:
        maps = Path(f"/proc/{self.pid}/maps").read_text(encoding="utf-8")
        found = re.search(r"^([0-9a-f]+)-([0-9a-f]+) r-xp .*\[vdso\]$", maps, re.MULTILINE)
        assert found, maps
        start, end = (int(each, 16) for each in found.groups())
        return start + os.pread(self._memory, end - start, start).index(_SYSCALL)

    def _trace(self, request: int, data: object = None) -> None:
        if _libc.ptrace(request, self.pid, None, data) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    def _wait(self) -> None:
        # A process that its own filter kills for the call may never be reported.
        status = until(lambda: os.waitpid(self.pid, _WALL | os.WNOHANG)[1], within_s=_STOPS_WITHIN_S)
        assert os.WIFSTOPPED(status), status
        assert os.WSTOPSIG(status) in {signal.SIGSTOP, signal.SIGTRAP}, status

"""The reason why a virtual machine ended, from the traces that it left. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.override import override

if TYPE_CHECKING:
    from collections.abc import Sequence

_PANIC_MARK = "Kernel panic - not syncing"
_INIT_DIED = "Attempted to kill init"
_WARNING = re.compile(r"(?:^|: )warning: |^\[[^\]]*\bWARN\b", re.IGNORECASE)
"""How QEMU and the Rust daemons mark lines that report no failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a process ended. One of the two fields is set, or neither if another process reaped it.

    :param code: the status it exited with.
    :param signal: the number of the signal that killed it.
    """

    code: int | None = None
    signal: int | None = None

    @override
    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        if self.code is not None:
            return f"exited with status {self.code}"
        return "ended with an unknown status"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """QEMU's ``SHUTDOWN`` event.

    :param by_guest: whether the guest asked for it.
    :param cause: QEMU's ``ShutdownCause``, for example ``guest-reset``.
    """

    by_guest: bool
    cause: str


def last_words(output: str, status: ExitStatus | None) -> list[str]:
    """Choose the lines of a program's output that may be the cause of its end.

    :param output: its output.
    :param status: how it ended, or ``None`` if it has not. A program that failed and left nothing but
        warnings may have meant one of them.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    failures = [line for line in lines if not _WARNING.search(line)]
    has_failed = status is not None and bool(status.code)
    return failures or (lines if has_failed else [])


def _panic(console: Sequence[str]) -> str | None:
    """Find the kernel's line about its panic. If process 1 died, its line just before is the cause."""
    for index in range(len(console) - 1, -1, -1):
        if _PANIC_MARK in console[index]:
            last_words = f"; before that: {console[index - 1]}" if index else ""
            return console[index] + (last_words if _INIT_DIED in console[index] else "")
    return None


def vm_exit_reason(
    status: ExitStatus, *, shutdown: Shutdown | None, console: Sequence[str], stderr: str
) -> str:
    """Say in one line why QEMU ended.

    :param status: how the QEMU process ended.
    :param shutdown: the last ``SHUTDOWN`` event, if there was one.
    :param console: the last lines of the guest's console.
    :param stderr: the last lines QEMU wrote to its standard error, joined.
    """
    if shutdown is not None:
        panic = _panic(console)
        if shutdown.cause == "guest-panic":
            return f"guest panicked: {panic or (console[-1] if console else 'no console output')}"
        if shutdown.cause == "guest-reset":
            # Before the panic device's driver is loaded, a panic appears only as a reset.
            return f"guest panicked: {panic}" if panic else "guest reset"
        if shutdown.by_guest:
            return "guest powered off"
        return f"QEMU was told to quit ({shutdown.cause})"
    return f"QEMU {status}: {stderr}" if stderr else f"QEMU {status}"

"""The agent's steps and their times, for the host's timeline of a start.

Times are read from this machine's monotonic clock, which began with its kernel.
"""

from __future__ import annotations

import time

from guest.agent import kernel
from proto.extensions import READY_MARK

_MOST = 100  # all requests of a machine's life would be too many
_BLOCKING = {"GetDiagnosticData", "GetOOMEvent", "ReadStderr", "ReadStdout", "WaitProcess", "WriteStdin"}
_UNPACKING, _UNPACKED = b"] Trying to unpack rootfs image", b"] Freeing initrd memory"
_BOOTED = b"] Run /init as init process"
_SERVING, _PLUGGING, _PLUGGED = f"] {READY_MARK}".encode(), b"] pci 0000:", b": enabling device"

_noted: list[tuple[str, float, float]] = []
_lap_s = 0.0


def lap(name: str) -> None:
    """Record the phase since the last lap; the first lap began when the kernel started the agent."""
    global _lap_s
    began_s, _lap_s = _lap_s, time.monotonic()
    _noted.append((name, began_s, _lap_s))


def note(name: str, began_s: float) -> None:
    """Record a phase that ends now, unless it is a request that waits for an event.

    :param name: the phase.
    :param began_s: when it began, in seconds of ``time.monotonic()``.
    """
    if len(_noted) < _MOST and name not in _BLOCKING:
        _noted.append((name, began_s, time.monotonic()))


def report() -> str:
    """Format everything for the host.

    :returns: the time now, then a line ``BEGAN ENDED WHO NAME`` for each phase since the last report; all in
        seconds.
    """
    lines = [f"{time.monotonic():.6f}"]
    while _noted:
        name, began_s, ended_s = _noted.pop(0)
        if not began_s:
            began_s = _report_kernel(lines)
        lines.append(f"{began_s:.6f} {ended_s:.6f} agent {name}")
    return "\n".join(lines)


def _report_kernel(lines: list[str]) -> float:
    """Add the phases before the agent; return when they began."""
    messages = kernel.messages()
    booted_s, unpacked_s = _stamp(messages, _BOOTED), _stamp(messages, _UNPACKED)
    lines.append(f"0 {booted_s:.6f} kernel boot")
    lines.append(f"{_stamp(messages, _UNPACKING):.6f} {unpacked_s:.6f} kernel unpack the initramfs")
    since = messages[messages.find(_SERVING) :]
    if _PLUGGING in since:
        plugged_s = _stamp(since, _PLUGGED, last=True)
        lines.append(f"{_stamp(since, _PLUGGING):.6f} {plugged_s:.6f} kernel take new devices")
    return booted_s


def _stamp(messages: bytes, text: bytes, *, last: bool = False) -> float:
    """Read when the kernel first, or last, logged a message; 0 if its log does not have the message."""
    end = messages.rfind(text) if last else messages.find(text)
    if end < 0:
        return 0.0
    begin = messages.rfind(b"\n", 0, end) + 1
    return float(messages[messages.find(b"[", begin) + 1 : messages.find(b"]", begin)])

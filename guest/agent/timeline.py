"""What the agent did and when, for the host's timeline of a start.

The times are of this machine's monotonic clock, which began with its kernel.
"""

from __future__ import annotations

import time

from guest.agent import kernel

_MOST = 100  # the life of a machine has no end of requests; its start has
_BLOCKING = {"GetDiagnosticData", "GetOOMEvent", "ReadStderr", "ReadStdout", "WaitProcess", "WriteStdin"}
_UNPACKING, _UNPACKED = b"] Trying to unpack rootfs image", b"] Freeing initrd memory"
_BOOTED = b"] Run /init as init process"

_noted: list[tuple[str, float, float]] = []
_lap_s = 0.0


def lap(name: str) -> None:
    """Note what was done since the last lap; the first began when the kernel was done."""
    global _lap_s
    began_s, _lap_s = _lap_s, time.monotonic()
    _noted.append((name, began_s, _lap_s))


def note(name: str, began_s: float) -> None:
    """Note something that ends now, unless it is a request that waits for the world.

    :param name: what it was.
    :param began_s: when it began, in seconds of ``time.monotonic()``.
    """
    if len(_noted) < _MOST and name not in _BLOCKING:
        _noted.append((name, began_s, time.monotonic()))


def report() -> str:
    """Phrase everything for the host.

    :returns: the time now, then a line ``BEGAN ENDED NAME`` for each phase; all in seconds.
    """
    messages = kernel.messages()
    unpacking_s, unpacked_s = _stamp(messages, _UNPACKING), _stamp(messages, _UNPACKED)
    booted_s = _stamp(messages, _BOOTED)
    phases = [("kernel", 0.0, booted_s), ("unpack the initramfs", unpacking_s, unpacked_s)]
    phases += [(name, began_s or booted_s, ended_s) for name, began_s, ended_s in _noted]
    lines = [f"{began_s:.6f} {ended_s:.6f} {name}" for name, began_s, ended_s in phases if ended_s]
    return "\n".join([f"{time.monotonic():.6f}", *lines])


def _stamp(messages: bytes, text: bytes) -> float:
    """Read when the kernel logged a message; 0 if it did not, or does not any more."""
    end = messages.find(text)
    return float(messages[messages.rfind(b"[", 0, end) + 1 : end]) if end >= 0 else 0.0

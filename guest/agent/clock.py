"""The machine's clock: its time, its difference from the host's, and its correction.

If the host's kernel offers its own clock to the machine (ptp_kvm, under KVM), the agent reads the difference
there. Otherwise the host asks for the time and computes it. The host says by how much to move the clock.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import struct
import time

from guest.agent import files, kernel, modules
from guest.agent.console import log

_SECOND_NS = 10**9
_CLOCK_SOURCES = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
_PTP_CLASS, _PTP_DEVICE, _PTP_NAME = "/sys/class/ptp/ptp0/clock_name", "/dev/ptp0", "KVM virtual PTP"

# struct ptp_sys_offset of linux/ptp_clock.h: the count, then the system's time and the device's in turns.
_SAMPLES = 5
_PTP_TIME = struct.Struct("qII")
_PTP_HEADER_BYTES, _PTP_BYTES = 16, 16 + 51 * 16
_PTP_SYS_OFFSET = 0x43403D05

# struct timex of linux/timex.h, up to the tick.
_TIMEX = struct.Struct("I4x4qi4x6q")
_ADJ_SETOFFSET, _ADJ_NANO, _ADJ_TICK = 0x0100, 0x2000, 0x4000
_TICK_US, _SLOW_TICK_US = 10_000, 9_800
_SLOWNESS = (_TICK_US - _SLOW_TICK_US) / _TICK_US
_LARGE_NS = _SECOND_NS
"""A clock that is further ahead than this is set back: slowing it down would take minutes."""

_lock = _thread.allocate_lock()
_ptp: bool | None = None
_slow_until_s = 0.0


def report() -> str:
    """Tell the host the time.

    :returns: nanoseconds since 1970; and how far the clock is ahead of the host's, if that can be known here.
    """
    ahead = _ahead_of_host()
    return f"{time.time_ns()}" if ahead is None else f"{time.time_ns()} {ahead}"


def move(shift_ns: int, *, at_once: bool) -> None:
    """Move the clock.

    Programs may see it jump forward, but not back, unless it is a second or more ahead: it is slowed down by
    2 % until it is right.

    :param shift_ns: by how much, in nanoseconds.
    :param at_once: move it in one step in any case, because no program runs yet that could notice.
    :raises OSError: if the kernel refuses.
    """
    if shift_ns < 0 and not at_once and -shift_ns < _LARGE_NS:
        _slow_down(-shift_ns / _SECOND_NS / _SLOWNESS)
    else:
        _adjust(_ADJ_SETOFFSET | _ADJ_NANO, shift_ns=shift_ns)


def _slow_down(duration_s: float) -> None:
    """Slow the clock down for some time; a new call replaces the earlier one."""
    global _slow_until_s
    with _lock:
        was_slow, _slow_until_s = bool(_slow_until_s), time.monotonic() + duration_s
        if was_slow:
            return
        _adjust(_ADJ_TICK, tick_us=_SLOW_TICK_US)
    _thread.start_new_thread(_resume_rate, ())


def _resume_rate() -> None:
    global _slow_until_s  # noqa: PLW0603  as above
    while True:
        with _lock:
            left_s = _slow_until_s - time.monotonic()
            if left_s <= 0:
                _slow_until_s = 0.0
                _adjust(_ADJ_TICK, tick_us=_TICK_US)
                return
        time.sleep(left_s)


def _adjust(modes: int, *, shift_ns: int = 0, tick_us: int = 0) -> None:
    seconds, nanoseconds = divmod(shift_ns, _SECOND_NS)
    kernel.adjust_clock(_TIMEX.pack(modes, 0, 0, 0, 0, 0, 0, 0, 0, seconds, nanoseconds, tick_us))


def _ahead_of_host() -> int | None:
    """Compare the clock with the host's, if the host offers it."""
    global _ptp  # noqa: PLW0603  found out once
    if _ptp is None:
        _ptp = _find_ptp()
    if not _ptp:
        return None
    buffer = bytearray(_PTP_BYTES)
    struct.pack_into("I", buffer, 0, _SAMPLES)
    try:
        fd = os.open(_PTP_DEVICE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _PTP_SYS_OFFSET, buffer)
        finally:
            os.close(fd)
    except OSError as error:
        log(f"clock: {_PTP_DEVICE}: {error.strerror}; the host's clock is asked for by messages")
        _ptp = False
        return None
    return ahead_by(bytes(buffer))


def ahead_by(answer: bytes) -> int:
    """Compute from the device's answer how far the system's clock is ahead of it.

    :param answer: a ``struct ptp_sys_offset``; the comparison that took the least time counts.
    :returns: nanoseconds.
    """
    times: list[int] = [
        seconds * _SECOND_NS + nanoseconds
        for seconds, nanoseconds, _ in _PTP_TIME.iter_unpack(answer[_PTP_HEADER_BYTES:])
    ][: 2 * _SAMPLES + 1]
    rounds = zip(times[0::2], times[1::2], times[2::2], strict=False)
    before, host, after = min(rounds, key=lambda one: one[2] - one[0])
    return (before + after) // 2 - host


def _find_ptp() -> bool:
    try:
        if "kvm-clock" not in files.read(_CLOCK_SOURCES):
            return False
        modules.load("ptp_kvm")
        return files.read(_PTP_CLASS).strip() == _PTP_NAME
    except OSError as error:
        log(f"clock: ptp_kvm: {error.strerror}; the host's clock is asked for by messages")
        return False

"""The guest's clock follows the host's clock if it can be read, and programs never see it go back."""

from __future__ import annotations

import struct
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from guest.agent import clock

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


STEP, RATE = 0x2100, 0x4000


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls to the kernel: modes, seconds, nanoseconds, tick."""
    requests: list[tuple[int, ...]] = []

    def adjust(request: bytes) -> None:
        requests.append((*struct.unpack_from("I", request), *struct.unpack_from("3q", request, 72)))

    monkeypatch.setattr(clock.kernel, "adjust_clock", adjust)
    return requests


@pytest.mark.parametrize(
    ("shift_ns", "at_once", "step"),
    [
        (1_500_000_000, False, (1, 500_000_000)),
        (2_000_000, False, (0, 2_000_000)),
        (-2_000_000, True, (-1, 998_000_000)),
        (-5_000_000_000, False, (-5, 0)),
    ],
)
def test_the_clock_is_set_if_it_is_late_or_far_off_or_nothing_runs_yet(
    asked: list[Any], shift_ns: int, at_once: bool, step: tuple[int, int]
) -> None:
    clock.move(shift_ns, at_once=at_once)
    assert asked == [(STEP, *step, 0)]


def test_a_clock_slightly_ahead_is_slowed_down_until_it_is_right(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    slept: list[float] = []
    times = iter([100.0, 100.0, 101.0, 110.0])
    # Only this module's: other threads of the test's process ask for the time, too.
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: next(times), sleep=slept.append))

    def start(function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
        function(*arguments)
        ended.set()

    monkeypatch.setattr(clock._thread, "start_new_thread", start)
    clock.move(-100_000_000, at_once=False)
    assert ended.is_set()
    assert slept == pytest.approx([5.0, 4.0])
    assert asked == [(RATE, 0, 0, 9_800), (RATE, 0, 0, 10_000)]


def test_the_fastest_reading_of_the_hosts_clock_counts() -> None:
    def at(nanoseconds: int) -> bytes:
        return struct.pack("qII", *divmod(nanoseconds, 10**9), 0)

    system = [0, 900, 1_000, 3_000, 4_000, 9_000]
    host = [7, 450, 2, 3, 4]
    times = [system[0]]
    for index, theirs in enumerate(host):
        times += [theirs, system[index + 1]]
    answer = struct.pack("4I", 5, 0, 0, 0) + b"".join(map(at, times))
    assert clock.ahead_by(answer.ljust(832, b"\0")) == 950 - 450


def test_a_machine_without_the_hosts_clock_reports_only_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_ptp", None)
    monkeypatch.setattr(clock.files, "read", lambda _path: "hpet acpi_pm \n")
    assert clock.report().isdigit()

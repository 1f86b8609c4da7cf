"""A kill for memory is always reported, and before the end of the process."""

from __future__ import annotations

import os
import threading
import time

import pytest

from guest.agent import cgroup, oom
from guest.agent.ttrpc import Call
from tests.waiting import WITHIN_S


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel's counter; its file shows no change, as if it had just been read."""
    counted = [0]
    monkeypatch.setattr(cgroup, "open_kills", lambda _path: os.eventfd(0, os.EFD_CLOEXEC))
    monkeypatch.setattr(cgroup, "kills", lambda _fd: counted[0])
    monkeypatch.setattr(oom, "_counters", {})
    monkeypatch.setattr(oom, "_changed_fd", os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    monkeypatch.setattr(oom, "_asked", True)
    monkeypatch.setattr(oom, "SETTLE_TIMEOUT_S", WITHIN_S)
    return counted


class _Watched(Call):
    """A call that reports when it waits."""

    __slots__ = ("waits",)

    def __init__(self) -> None:
        super().__init__(os.eventfd(0, os.EFD_CLOEXEC), 0)
        self.waits = threading.Semaphore(0)

    def wait(self, **what: object) -> list[int]:
        self.waits.release()
        return super().wait(**what)  # type: ignore[arg-type]  # passed on unchanged


def test_a_kill_is_reported_even_if_the_end_was_seen_first(kills: list[int]) -> None:
    oom.watch("box", "/box")
    told: list[str] = []
    call = _Watched()

    def serve() -> None:
        told.append(oom.next_kill(call))
        assert call.afterwards is not None
        call.afterwards()

    waiter = threading.Thread(target=serve, daemon=True)
    waiter.start()
    for _ in ("the container is new", "nothing happens to it"):
        assert call.waits.acquire(timeout=WITHIN_S)
    kills[0] = 1
    began_s = time.monotonic()
    oom.settle("box")
    assert time.monotonic() - began_s < WITHIN_S
    waiter.join(WITHIN_S)
    assert told == ["box"]

"""A file system that hangs is found out by a thread that is given up, and the event loop goes on."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from shim.errors import DeadlineExceeded
from shim.host import answering
from shim.host.answering import all_answer
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HUNG = "/hung/file"


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A host where one path does not answer before the event, and no other thread is slow."""
    reached, answers = threading.Event(), threading.Event()

    def look_up(path: str) -> None:
        if path == HUNG and not answers.is_set():
            reached.set()
            answers.wait()

    class Prompt(threading.Thread):
        """A thread that is at the path that hangs once it has been started."""

        def start(self) -> None:
            super().start()
            assert answers.is_set() or reached.wait(WITHIN_S)

    monkeypatch.setattr(answering, "_look_up", look_up)
    monkeypatch.setattr(answering, "threading", SimpleNamespace(Thread=Prompt))
    yield answers
    answers.set()


@pytest.mark.parametrize("path", ["/", "/nonexistent/file", "a NUL \0 byte", "x" * 5000])
async def test_any_answer_will_do(path: str) -> None:
    await all_answer([path], phase="create")


async def test_the_path_that_does_not_answer_is_named(
    hung: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "ANSWER_TIMEOUT_S", 0.05)
    with pytest.raises(DeadlineExceeded, match=r"^create: /hung/file: its file system has not answered"):
        await all_answer([str(tmp_path), HUNG, "/"], phase="create")
    assert not hung.is_set()


async def test_a_late_answer_disturbs_nobody(hung: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "ANSWER_TIMEOUT_S", 0.05)
    with pytest.raises(DeadlineExceeded):
        await all_answer([HUNG], phase="create")
    hung.set()
    for thread in threading.enumerate():
        if thread.name == "lookup":
            thread.join()
    monkeypatch.setattr(answering, "ANSWER_TIMEOUT_S", WITHIN_S)
    await all_answer([HUNG], phase="create")

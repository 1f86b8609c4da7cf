"""Checks that the file systems of some paths answer, before the shim depends on them.

A file system that another machine or program serves can hang for good, and a process that touches it hangs,
too. So a thread first looks up each path that a client names, and is given up if it does not return.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING

from shim.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Iterable

ANSWER_TIMEOUT_S = 10.0
"""A network file system that is only busy answers within seconds."""


async def all_answer(paths: Iterable[str], *, phase: str) -> None:
    """Wait until the file system of each path has answered, even if it has no such file.

    :param paths: of the host; they need not exist.
    :param phase: the beginning of an error's message.
    :raises DeadlineExceeded: if one does not answer in time.
    """
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    asked = list(dict.fromkeys(paths))
    now = ""

    def finish() -> None:
        if not answered.done():
            answered.set_result(None)

    def ask() -> None:
        nonlocal now
        for now in asked:
            _look_up(now)
        with contextlib.suppress(RuntimeError):  # it took too long, and the loop has ended
            loop.call_soon_threadsafe(finish)

    # A daemon, so that the end of this process does not wait for it.
    threading.Thread(target=ask, name="lookup", daemon=True).start()
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await answered
    except TimeoutError:
        raise DeadlineExceeded(
            f"{phase}: {now}: its file system has not answered for {ANSWER_TIMEOUT_S:g} s; see whether its "
            "server is gone, or unmount it"
        ) from None


def _look_up(path: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.stat(path)  # noqa: PTH116 - no file may be able to have this path

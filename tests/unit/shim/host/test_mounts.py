"""Mount options become the arguments of mount(2)."""

from __future__ import annotations

import asyncio
import threading

import pytest

from shim.host.mounts import MountOptions, parse_options, run_to_the_end
from tests.waiting import WITHIN_S, settle


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], MountOptions(0, "")),
        (["ro"], MountOptions(1, "")),
        (["ro", "rw"], MountOptions(0, "")),
        (["nosuid", "nodev", "noexec"], MountOptions(2 | 4 | 8, "")),
        (["rbind", "ro"], MountOptions(4096 | 16384 | 1, "")),
        (
            ["lowerdir=/a:/b", "upperdir=/c", "index=off"],
            MountOptions(0, "lowerdir=/a:/b,upperdir=/c,index=off"),
        ),
        (["ro", "size=64k"], MountOptions(1, "size=64k")),
    ],
)
def test_flags_and_data_are_told_apart(options: list[str], expected: MountOptions) -> None:
    assert parse_options(options) == expected


async def test_unmounting_finishes_even_if_the_caller_gives_up() -> None:
    begun, allowed, ended = threading.Event(), threading.Event(), threading.Event()

    def unmount() -> None:
        begun.set()
        allowed.wait(WITHIN_S)
        ended.set()

    asked = asyncio.create_task(run_to_the_end(unmount))
    await asyncio.to_thread(begun.wait, WITHIN_S)
    for _ in range(2):
        asked.cancel()
        await settle()
    assert not asked.done()
    allowed.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert ended.is_set()


async def test_an_error_of_unmounting_reaches_the_caller() -> None:
    def refuse() -> None:
        raise OSError("busy")

    with pytest.raises(OSError, match="busy"):
        await run_to_the_end(refuse)

"""A mount or an unmount is an event."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
from typing import Any

import pytest

from shim.host.mount_changes import MountChanges
from tests.waiting import WITHIN_S, settle

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_REC = 16384
MS_PRIVATE = 1 << 18


async def mount_and_unmount() -> None:
    changes = MountChanges()
    try:
        waiting = asyncio.ensure_future(changes.wait())
        await settle()
        assert not waiting.done()
        libc: Any = ctypes.CDLL(None, use_errno=True)
        for call, arguments in (
            (libc.mount, (b"tmpfs", b"/tmp", b"tmpfs", 0, None)),
            (libc.umount2, (b"/tmp", 0)),
        ):
            assert call(*arguments) == 0, os.strerror(ctypes.get_errno())
            await asyncio.wait_for(waiting, WITHIN_S)
            waiting = asyncio.ensure_future(changes.wait())
        waiting.cancel()
    finally:
        changes.close()


def in_own_namespace() -> None:
    flags = CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER
    libc = ctypes.CDLL(None)
    if libc.unshare(flags) != 0 or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        os._exit(77)
    asyncio.run(mount_and_unmount())


def test_each_change_of_the_mounts_is_an_event() -> None:
    process = multiprocessing.get_context("spawn").Process(target=in_own_namespace)
    process.start()
    process.join()
    if process.exitcode == 77:
        pytest.skip("this user may not make namespaces")
    assert process.exitcode == 0

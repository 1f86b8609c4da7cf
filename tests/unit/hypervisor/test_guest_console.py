"""The console keeps only the end of the guest's output."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from hypervisor import console as console_module
from hypervisor.allowance import Allowance
from hypervisor.console import Console
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def console_and_guest(tmp_path: Path) -> AsyncIterator[tuple[Console, socket.socket]]:
    with ExitStack() as handover:
        console = Console(tmp_path / "console.log", handover=handover)
        guest = socket.socket(fileno=os.dup(console.qemu_fd))
    with guest:
        yield console, guest
    console.close()


async def write(console: Console, guest: socket.socket, data: bytes) -> None:
    guest.settimeout(0)
    console.grew.clear()
    await asyncio.get_running_loop().sock_sendall(guest, data)
    async with asyncio.timeout(WITHIN_S):
        await console.grew.wait()


async def test_the_tail_has_the_last_lines_in_printable_form(
    console_and_guest: tuple[Console, socket.socket],
) -> None:
    console, guest = console_and_guest
    await write(console, guest, b"one\r\ntwo\r\n\x1b[1mthree\r\nfo")
    assert console.tail(2) == [" [1mthree", "fo"]
    assert console.tail(0) == []


async def test_output_written_just_before_the_end_is_still_read(
    console_and_guest: tuple[Console, socket.socket], tmp_path: Path
) -> None:
    console, guest = console_and_guest
    guest.sendall(b"last words\n")
    guest.close()
    console.close()
    assert console.tail(1) == ["last words"]
    assert (tmp_path / "console.log").read_bytes() == b"last words\n"


async def test_a_flood_keeps_only_the_newest_output_in_memory_and_on_disk(
    console_and_guest: tuple[Console, socket.socket], tmp_path: Path
) -> None:
    console, guest = console_and_guest
    console._allowance = Allowance(burst=1 << 30, per_s=0)
    for _ in range(48):
        await write(console, guest, b"x" * 65535 + b"\n")
    await write(console, guest, b"the end\n")
    console.close()
    log = tmp_path / "console.log"
    assert log.stat().st_size <= 1 << 20
    assert log.read_bytes().endswith(b"the end\n")
    assert console.tail(1) == ["the end"]
    assert len(console._tail) <= 64 * 1024


async def test_a_guest_that_writes_too_much_is_read_slowly(
    console_and_guest: tuple[Console, socket.socket],
) -> None:
    console, guest = console_and_guest
    pauses: list[float] = []
    console._on_pause = lambda: pauses.append(time.monotonic())
    console._allowance = Allowance(burst=10, per_s=0)
    await write(console, guest, b"ten bytes\n")
    assert pauses == []
    await write(console, guest, b"more than ten bytes\n")
    assert len(pauses) == 1
    assert not asyncio.get_running_loop().remove_reader(console._stream)
    await write(console, guest, b"read after a pause\n")
    assert console.tail(1) == ["read after a pause"]


async def test_unread_output_is_read_at_the_end(
    console_and_guest: tuple[Console, socket.socket],
) -> None:
    console, guest = console_and_guest
    console._allowance = Allowance(burst=10, per_s=0)
    await write(console, guest, b"more than ten bytes\n")
    guest.sendall(b"x" * (100 << 10) + b"\nKernel panic\n")
    console.close()
    assert console.tail(1) == ["Kernel panic"]


async def test_the_time_of_output_is_recorded_beside_it(
    console_and_guest: tuple[Console, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "_TIMES_APART_S", WITHIN_S)
    console, guest = console_and_guest
    began_s = time.time()
    await write(console, guest, b"one\n")
    await write(console, guest, b"at once\n")

    [note] = (tmp_path / "console.times").read_text().splitlines()
    offset, at_s = note.split()
    assert offset == "0"
    assert began_s - 0.001 <= float(at_s) <= time.time() + 0.001

"""What a guest writes to its console is bounded and safe to show on a terminal."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.console import Console
from tests.fuzz.peers import MIB

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    import pytest


CASES = settings().max_examples

chunks = st.lists(
    st.one_of(
        st.binary(max_size=300),
        st.sampled_from(
            [b"\x1b[2J\x1b]0;x\x07", b"\r\r\n", b"\xff\xfe", b"\0" * 200, "é\u2028\u202e".encode()]
        ),
    ),
    max_size=8,
)


async def shown(log: Any, said: Any, *, lines: Any) -> Any:
    with ExitStack() as handover:
        console = Console(log, handover=handover)
        guest = socket.socket(fileno=socket.dup(console.qemu_fd))
    for chunk in said:
        guest.sendall(chunk)
    guest.close()
    console.close()
    return console.tail(lines)


@settings(max_examples=3 * CASES)
@given(said=chunks, lines=st.integers(-1, 50))
def test_any_output_is_shown_as_printable_lines(
    tmp_path_factory: pytest.TempPathFactory, said: Any, lines: Any
) -> None:
    log = tmp_path_factory.getbasetemp() / "console.log"
    tail = asyncio.run(shown(log, said, lines=lines))
    assert len(tail) <= max(lines, 0)
    assert all(line and line.isprintable() for line in tail)
    assert log.read_bytes() == b"".join(said)


async def flood(log: Any) -> Any:
    with ExitStack() as handover:
        console = Console(log, handover=handover)
        guest = socket.socket(fileno=socket.dup(console.qemu_fd))
    guest.setblocking(False)
    for _ in range(80):
        await asyncio.get_running_loop().sock_sendall(guest, b"x" * 65536)
    guest.close()
    console.close()
    return console.tail(1000)


def test_a_flood_without_a_line_end_stays_within_bounds(tmp_path: Path) -> None:
    tail = asyncio.run(flood(tmp_path / "log"))
    assert sum(map(len, tail)) <= MIB
    assert (tmp_path / "log").stat().st_size <= MIB

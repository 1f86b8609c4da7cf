"""Features that a share lacks: each of these works in runc's containers, and is a row of docs/limits.md."""

from __future__ import annotations

import fcntl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.e2e.interpreter import interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack
    from tests.e2e.interpreter import Interpreter

BLOCK = 4096
FILE = "/volume/file"
WATCHING_S = 4
RANGE = f"-o {BLOCK} -l {BLOCK} {FILE}"


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("volume")
    (path / "file").write_bytes(bytes(16 * BLOCK))
    return path


@pytest.fixture(scope="module")
def box(either_stack: Stack, volume: Path) -> Iterator[Interpreter]:
    with interpreter(either_stack, binds={volume: "/volume"}) as opened:
        yield opened


@pytest.mark.inherent("temporary-files")
def test_a_file_can_be_made_without_a_name(box: Interpreter) -> None:
    program = "import os; os.open('/volume', os.O_TMPFILE | os.O_RDWR)"
    box.execute("/usr/bin/python3", "-c", program)


@pytest.mark.inherent("extents")
def test_a_files_extents_can_be_listed(box: Interpreter) -> None:
    assert " 0 extents" not in box.ask("/usr/sbin/filefrag", FILE)


@pytest.mark.inherent("file-flags")
def test_a_files_flags_can_be_changed(box: Interpreter) -> None:
    box.execute("/usr/bin/chattr", "+d", FILE)


@pytest.mark.inherent("birth-time")
def test_a_files_birth_time_is_known(box: Interpreter) -> None:
    assert int(box.ask("/usr/bin/stat", "-c", "%W", FILE)) > 0


@pytest.mark.inherent("shifted-ranges")
def test_a_range_can_be_taken_out_of_a_file_and_put_into_one(box: Interpreter) -> None:
    box.execute("/usr/bin/fallocate", "--collapse-range", *RANGE.split())
    box.execute("/usr/bin/fallocate", "--insert-range", *RANGE.split())


@pytest.mark.inherent("host-events")
def test_a_change_of_the_host_is_an_event(box: Interpreter, volume: Path) -> None:
    with ThreadPoolExecutor() as pool:
        watching = pool.submit(box.run, "events", "/volume", str(WATCHING_S))
        number = 0
        while not watching.done():
            (volume / f"new-{number}").touch()
            number += 1
            time.sleep(0.2)
    assert "new-" in watching.result()


@pytest.mark.inherent("locks-across")
def test_a_lock_of_the_host_is_held_against_a_container(box: Interpreter, volume: Path) -> None:
    with (volume / "file").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = box.ask("sh", "-c", f"/usr/bin/flock --nonblock {FILE} echo granted || echo refused")
    assert said == "refused\n"

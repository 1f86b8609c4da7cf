"""Supervised processes: their end is an event, their last output is kept, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hypervisor import process as process_module
from hypervisor.exits import ExitStatus
from hypervisor.printable import printable
from hypervisor.process import LINE_LIMIT, ChildProcess, waits_more_than_it_runs
from tests.descriptors import descriptors
from tests.waiting import WITHIN_S, ends, reached


def shell(script: str, **kwargs: Any) -> ChildProcess:
    return ChildProcess.spawn("test", ["/bin/sh", "-c", script], **kwargs)


async def wait_for_output(process: ChildProcess, text: str) -> None:
    await reached(lambda: text in process.output())


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        ("exit 0", ExitStatus(code=0), "exited with status 0"),
        ("exit 42", ExitStatus(code=42), "exited with status 42"),
        ("kill -9 $$", ExitStatus(signal=9), "killed by signal 9"),
    ],
)
async def test_the_exit_status_or_signal_is_reported(script: str, status: ExitStatus, text: str) -> None:
    process = shell(script)
    assert await process.exited == status
    assert str(status) == text
    assert gone(process.pid)


async def test_kill_ends_a_process_and_is_harmless_afterwards() -> None:
    process = shell("exec sleep 60")
    process.kill()
    assert (await process.exited).signal == signal.SIGKILL
    process.kill()


async def test_the_obituary_has_the_last_lines_of_both_outputs() -> None:
    process = shell("for i in 1 2 3; do echo out $i; echo; done; echo err >&2; exit 3")
    await process.exited
    assert process.obituary() == "test exited with status 3: out 2; out 3; err"


async def test_only_the_end_of_the_output_is_kept() -> None:
    process = shell("head -c 1000000 /dev/zero | tr '\\0' x; echo; echo the end")
    await process.exited
    assert len(process.output()) <= 64 * 1024
    assert process.last_words().endswith("the end")


@pytest.mark.parametrize(
    ("most", "expected"),
    [(0, []), (2, ["test: 1", "test: 2", "test: goes on; its further output is not logged"])],
)
async def test_only_the_first_lines_of_the_output_are_logged(
    caplog: pytest.LogCaptureFixture, most: int, expected: list[str]
) -> None:
    caplog.set_level("DEBUG", logger="hypervisor.output")
    process = shell("echo 1; echo 2; echo 3", logged_lines=most)
    await process.exited
    assert [record.getMessage() for record in caplog.records] == expected
    assert process.output() == "1\n2\n3\n"


async def test_only_listed_descriptors_are_inherited() -> None:
    listed, other = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(other, False)
    process = shell(f"test -e /dev/fd/{listed} && test ! -e /dev/fd/{other}", inherit=[listed])
    try:
        assert (await process.exited).code == 0, process.output()
    finally:
        os.close(listed)
        os.close(other)


async def test_a_program_that_cannot_be_executed_is_reported_at_once() -> None:
    process = ChildProcess.spawn("test", ["/nonexistent/program"])
    assert (await process.exited).code == 127
    assert "/nonexistent/program" in process.last_words()


async def test_no_descriptor_leaks() -> None:
    before = descriptors()
    for _ in range(20):
        await shell("echo x").exited
    assert descriptors() <= before


async def test_destroying_a_process_ends_the_workers_it_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_REAPING_S", WITHIN_S)
    parent = shell("sleep 60 & echo forked; wait")
    await wait_for_output(parent, "forked")
    parent.adopt_workers()
    (worker,) = parent.workers
    await parent.destroy()
    assert parent.exited.result() == ExitStatus(code=0), "it reaped its worker and ended by itself"
    assert worker.exited.result() == ExitStatus(), "a grandchild's status belongs to its parent"
    assert gone(parent.pid)
    assert gone(worker.pid)


def test_a_child_dies_with_its_parent() -> None:
    script = (
        "import asyncio, os\n"
        "from hypervisor.process import ChildProcess\n"
        "from tests.waiting import reached\n"
        "async def main():\n"
        "    child = ChildProcess.spawn('child', ['sh', '-c', 'echo up; exec sleep 60'])\n"
        "    await reached(lambda: 'up' in child.output())\n"
        "    print(child.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert ends(int(result.stdout))


@pytest.mark.parametrize(
    ("line", "shown"),
    [("plain", "plain"), ("a\x1b[31mb\r", "a [31mb"), ("x" * 1000, "x" * 400)],
    ids=["plain", "control characters", "long"],
)
def test_lines_from_outside_are_made_printable(line: str, shown: str) -> None:
    assert printable(line, limit=LINE_LIMIT) == shown


_PAGES = "grep THP_enabled /proc/self/status"


@pytest.mark.parametrize(("huge_pages", "enabled"), [(True, "1"), (False, "0")])
async def test_only_the_chosen_program_runs_without_transparent_huge_pages(
    huge_pages: bool, enabled: str
) -> None:
    said = []
    for process in (shell(_PAGES, huge_pages=huge_pages), shell(_PAGES)):
        await process.exited
        said.append(process.output().split())
    assert said == [["THP_enabled:", enabled], ["THP_enabled:", "1"]]


@pytest.mark.parametrize(
    ("threads", "starved"),
    [
        (["900 100 5\n", "0 0 1\n"], False),
        (["900 100 5\n", "100 901 5\n"], True),
        (["0 0 1\n"], False),
        ([], False),
    ],
)
def test_a_process_is_starved_if_it_waits_for_processors_longer_than_it_runs(
    threads: list[str], starved: bool
) -> None:
    assert waits_more_than_it_runs(threads) is starved


async def test_each_of_many_processes_on_one_processor_is_starved() -> None:
    busy = ["taskset", "-c", "0", "sh", "-c", "while :; do :; done"]
    rivals = [ChildProcess.spawn("rival", busy) for _ in range(4)]
    try:
        await reached(lambda: all(rival.is_starved for rival in rivals))
    finally:
        for rival in rivals:
            rival.kill()
            await rival.exited

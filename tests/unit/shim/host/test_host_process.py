"""Whether a recorded process runs, by what proc(5) says of it."""

from __future__ import annotations

import os

import pytest

from shim.host import host_process
from shim.host.host_process import HostProcess

STARTED = 500
RUNNING, EXITING = 0x400000, 0x40010C  # flags; as the kernel had them for a process before and after SIGKILL


def fields(*, flags: int, state: bytes = b"S") -> list[bytes]:
    """What stat has after the command's name, up to the start time."""
    return [state, *[b"0"] * 5, b"%d" % flags, *[b"0"] * 12, b"%d" % STARTED]


@pytest.mark.parametrize(
    ("found", "recorded", "runs"),
    [
        (fields(flags=RUNNING), STARTED, True),
        (fields(flags=RUNNING, state=b"T"), STARTED, True),
        (fields(flags=RUNNING), STARTED + 1, False),
        (fields(flags=EXITING), STARTED, False),
        (fields(flags=EXITING, state=b"Z"), STARTED, False),
    ],
    ids=["running", "stopped", "another with its pid", "exiting", "zombie"],
)
def test_a_process_runs_until_the_kernel_begins_to_end_it(
    monkeypatch: pytest.MonkeyPatch, found: list[bytes], recorded: int, runs: bool
) -> None:
    monkeypatch.setattr(host_process, "_fields", lambda _pid: found)
    assert host_process.is_running(HostProcess(pid=1, start_time=recorded)) is runs


def test_this_process_runs_and_one_that_has_been_waited_for_does_not() -> None:
    child = os.posix_spawn("/bin/cat", ["cat", "/dev/null"], {})
    recorded = host_process.identify(child)
    os.waitpid(child, 0)
    assert host_process.is_running(host_process.identify(os.getpid()))
    assert not host_process.is_running(recorded)

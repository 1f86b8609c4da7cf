"""Processes in the guest itself run by the one shell that its modules' directory has."""

from __future__ import annotations

import os
import select
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from guest.agent import guest_shell
from guest.agent.errors import AgentError, NotFound
from guest.agent.guest_shell import GuestProcesses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guest.agent.process import Process
    from guest.agent.ttrpc import Call
    from guest.agent.wire import Message

SIZE = 1 << 16
TIMEOUT_S = 20.0


class Asking:
    """A request whose caller waits."""

    def wait(
        self, *, readable: tuple[int, ...], writable: tuple[int, ...] = (), timeout_s: float = TIMEOUT_S
    ) -> list[int]:
        """Wait until a descriptor is ready."""
        ready = select.select(readable, writable, [], timeout_s)
        return ready[0] + ready[1]


CALL = cast("Call", Asking())


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel says that the shell is."""
    named = tmp_path / "modprobe"
    named.write_text("/bin/sh\n")
    monkeypatch.setattr(guest_shell, "_PROGRAM", str(named))
    return named


@pytest.fixture
def start(shell: Path) -> Iterator[Callable[..., tuple[GuestProcesses, Process]]]:
    """Start a process; what is not reaped by the test is reaped at its end."""
    started: list[Process] = []
    guest = GuestProcesses()

    def begin(*args: str, exec_id: str = "one", **fields: Any) -> tuple[GuestProcesses, Process]:
        process = guest.execute(exec_id, asked(*args, **fields))
        started.append(process)
        return guest, process

    yield begin
    for process in started:
        if process.end.status is None:
            process.signal(9)
            reap(process)
        process.streams.close()


def asked(*args: str, **fields: Any) -> Message:
    return cast(
        "Message",
        SimpleNamespace(**{"Args": [*args], "Env": [], "Terminal": False, "ConsoleSize": None, **fields}),
    )


def reap(process: Process) -> None:
    """Do what the agent's reaper does for process 1."""
    status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    process.end.set(128 - status if status < 0 else status)


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def output(process: Process) -> bytes:
    return b"".join(iter(lambda: process.read(process.streams.stdout, SIZE, CALL), b""))


def test_a_command_has_its_arguments_its_environment_and_its_own_streams(
    start: Callable[..., tuple[GuestProcesses, Process]],
) -> None:
    _, process = start("sh", "-c", 'cat; echo "$0 $GIVEN" >&2; exit 7', "a b", Env=["GIVEN=c d"])
    process.streams.stdin.write(b"typed", process.end, CALL)
    process.end_input()
    reap(process)

    assert output(process) == b"typed"
    assert process.read(process.streams.stderr, SIZE, CALL) == b"a b c d\n"
    assert process.wait(CALL) == 7


def test_without_a_command_it_is_a_shell(start: Callable[..., tuple[GuestProcesses, Process]]) -> None:
    _, process = start()
    process.streams.stdin.write(b"echo $((6*7)); exit 3\n", process.end, CALL)
    reap(process)

    assert (output(process), process.wait(CALL)) == (b"42\n", 3)


def test_a_terminal_has_the_wanted_size_and_is_the_sessions(
    start: Callable[..., tuple[GuestProcesses, Process]],
) -> None:
    script = "stty size; test -t 2 && echo shown >/dev/tty"
    _, process = start("sh", "-c", script, Terminal=True, ConsoleSize=SimpleNamespace(Height=31, Width=97))
    reap(process)

    assert output(process) == b"31 97\r\nshown\r\n"


def test_a_process_is_forgotten_once_its_status_and_its_outputs_are_taken(
    start: Callable[..., tuple[GuestProcesses, Process]],
) -> None:
    guest, process = start("echo", "out")
    reap(process)
    guest.forget_if_done("one")
    assert guest.process("one") is process

    assert (output(process), process.wait(CALL)) == (b"out\n", 0)
    guest.forget_if_done("one")
    assert guest.process("one") is process, "its errors are not read yet"
    assert process.read(process.streams.stderr, SIZE, CALL) == b""
    guest.forget_if_done("one")

    with pytest.raises(NotFound, match="one: not in the guest"):
        guest.process("one")
    guest.forget_if_done("one")


def test_an_id_is_taken_until_its_process_is_forgotten(
    start: Callable[..., tuple[GuestProcesses, Process]],
) -> None:
    start("cat")
    with pytest.raises(AgentError, match="one: the id exists already"):
        start("cat")
    guest, _ = start("cat", exec_id="two")
    assert guest.process("two") is not guest.process("one")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_shell_that_cannot_start_leaves_no_descriptor(
    shell: Path, tmp_path: Path, *, terminal: bool
) -> None:
    shell.write_text(f"{tmp_path}\n")  # a directory
    before = descriptors()
    with pytest.raises(PermissionError):
        GuestProcesses().execute("one", asked("id", Terminal=terminal))
    assert descriptors() == before


def test_an_image_without_a_shell_is_named_with_the_remedy(shell: Path) -> None:
    shell.write_text("/nowhere/busybox\n")
    with pytest.raises(AgentError, match=r"the guest has no shell: .*; build one"):
        GuestProcesses().execute("one", asked("id"))

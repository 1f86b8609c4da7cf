"""``ctr task exec``: further processes in a container that runs."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.containerd import CALL_TIMEOUT_S, converse
from tests.e2e.life import until
from tests.e2e.terminal import terminal

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack


def test_the_output_and_exit_code_of_an_exec_are_its_own(stack: Stack, long_lived: str) -> None:
    result = stack.containerd.exec(long_lived, "apart", "sh", "-c", "echo out; echo err >&2; exit 42")

    assert result.code == 42
    assert result.stdout == "out\n"
    assert result.stderr.startswith("err\n")


def test_an_exec_sees_the_processes_of_its_container(stack: Stack, long_lived: str) -> None:
    result = stack.containerd.exec(long_lived, "processes", "ps", "-o", "pid,args")

    assert "1 sleep 100000" in [line.strip() for line in result.stdout.splitlines()]


def test_stdin_reaches_an_exec_and_its_end_is_seen(stack: Stack, long_lived: str) -> None:
    argv = stack.containerd.ctr_argv("task", "exec", "--exec-id", "input", long_lived, "cat")

    assert converse(argv) == 0


def test_the_terminal_of_an_exec_has_the_size_of_the_window(stack: Stack, long_lived: str) -> None:
    argv = stack.containerd.ctr_argv("task", "exec", "-t", "--exec-id", "terminal", long_lived, "sh")
    with terminal(argv, rows=31, columns=97) as screen:
        screen.expect("# ")
        screen.send("test -t 0 && test -t 1 && test -t 2 && echo is'-'terminal\n")
        screen.expect("is-terminal")
        screen.send("while [ \"$(stty size)\" != '31 97' ]; do :; done; echo size'-'right\n")
        screen.expect("size-right")
        screen.send("exit 5\n")
        assert screen.wait() == 5


def test_many_execs_run_at_once_and_none_mixes_with_another(stack: Stack, long_lived: str) -> None:
    count = 8
    script = "for i in 1 2 3; do echo $0 $i; done; exit $0"
    started = [
        subprocess.Popen(
            stack.containerd.ctr_argv(
                "task", "exec", "--exec-id", f"many{number}", long_lived, "sh", "-c", script, str(number)
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number in range(count)
    ]
    outcomes = [(process.communicate(timeout=CALL_TIMEOUT_S)[0], process.returncode) for process in started]

    assert outcomes == [("".join(f"{number} {i}\n" for i in (1, 2, 3)), number) for number in range(count)]


def test_a_missing_program_fails_the_exec_and_harms_nothing_else(stack: Stack, long_lived: str) -> None:
    refused = stack.containerd.exec(long_lived, "missing", "no-such-program")
    assert refused.code != 0
    assert "no-such-program" in refused.stderr

    assert stack.containerd.exec(long_lived, "after", "echo", "alive").stdout == "alive\n"


def test_an_exec_is_killed_without_harm_to_its_container(stack: Stack, long_lived: str) -> None:
    argv = stack.containerd.ctr_argv(
        "task", "exec", "--exec-id", "victim", long_lived, "sh", "-c", "echo ready; exec sleep 1000"
    )
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        killed = stack.containerd.ctr("task", "kill", "--signal", "9", "--exec-id", "victim", long_lived)
        assert killed.code == 0, killed.stderr
        assert process.wait(CALL_TIMEOUT_S) == 137

    assert stack.containerd.tasks()[long_lived][1] == "RUNNING"


@pytest.mark.parametrize("size", [1, 65536, 1 << 20])
def test_the_output_of_an_exec_arrives_whole(stack: Stack, long_lived: str, size: int) -> None:
    result = stack.containerd.exec(long_lived, f"whole{size}", "head", "-c", str(size), "/dev/zero")

    assert len(result.stdout) == size


@pytest.mark.hako
def test_every_process_is_listed_behind_the_machines_and_an_exec_with_its_id(
    one_stack: Stack, request: pytest.FixtureRequest
) -> None:
    box = "listed"
    request.addfinalizer(lambda: one_stack.containerd.remove(box))
    started = one_stack.containerd.run(
        IMAGE, box, "sh", "-c", "sleep 1000 & exec sleep 2000", options=["--detach"]
    )
    assert started.code == 0, started.stderr
    third = subprocess.Popen(
        one_stack.containerd.ctr_argv("task", "exec", "--exec-id", "third", box, "sleep", "3000"),
        stdin=subprocess.DEVNULL,
    )

    def listed() -> list[str]:
        return one_stack.containerd.ctr("task", "ps", box).stdout.splitlines()[1:]

    until(
        lambda: len(lines := listed()) >= 3 and any("third" in line for line in lines),
        what="all three processes in the list",
    )
    lines = listed()
    pid = one_stack.containerd.tasks()[box][0]
    assert [int(line.split()[0]) for line in lines] == [pid] * 3
    assert sum("third" in line for line in lines) == 1
    one_stack.containerd.ctr("task", "kill", "--signal", "9", box)
    assert third.wait(CALL_TIMEOUT_S) == 137

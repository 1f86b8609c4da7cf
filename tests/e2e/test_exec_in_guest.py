"""``hako exec`` runs commands in the guest, where the operator allows that."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import _census, new_id, write_config
from tests.e2e.containerd import SHIM_DIRECTORY
from tests.e2e.life import until
from tests.e2e.terminal import terminal
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

    Argv = Callable[..., list[str]]

pytestmark = pytest.mark.hako

TIMEOUT_S = patient(60)


@pytest.fixture(scope="module")
def argv(one_stack: Stack, home: Path, templates: Path) -> Iterator[Argv]:
    """Make the command line of a command in the guest of a sandbox that allows it."""
    config = write_config(
        home / "exec.toml",
        state_directory=one_stack.state_directory,
        protocol=one_stack.protocol,
        templates=templates,
        guest=f"boot_timeout_s = {patient(60):.0f}\ndebug = true",
    )
    name = new_id()
    with _census(one_stack):
        options: list[str | Path] = ["--detach", "--runtime-config-path", config]
        started = one_stack.containerd.run(IMAGE, name, "sleep", "100000", options=options)
        try:
            assert started.code == 0, started.stderr
            yield lambda *command, options=(): [
                *(f"{SHIM_DIRECTORY}/hako", "exec", "--config", str(config), *options, name),
                *command,
            ]
        finally:
            one_stack.containerd.remove(name)


def run(argv: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_a_command_runs_as_root_in_the_guest_with_its_own_streams_and_status(argv: Argv) -> None:
    done = run(argv("--", "sh", "-c", "id -u; cat; ls -d /run/kata-containers >&2; exit 7"), stdin="given\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "0\ngiven\n", "/run/kata-containers\n")


def test_long_input_and_output_pass_whole(argv: Argv) -> None:
    text = "0123456789abcde\n" * (1 << 16)
    done = run(argv("cat"), stdin=text)
    assert (done.returncode, done.stderr, done.stdout == text) == (0, "", True)


def test_programs_are_told_output_and_status_at_once(argv: Argv) -> None:
    done = run(argv("sh", "-c", "echo out; echo err >&2; kill -9 $$", options=["--json"]))
    assert json.loads(done.stdout) == {"exit_status": 137, "stdout": "out\n", "stderr": "err\n"}
    assert done.returncode == 137


def test_a_shell_has_a_terminal_of_the_size_of_the_window(argv: Argv) -> None:
    with terminal(argv(), rows=30, columns=100) as window:
        window.expect("# ")
        window.send("stty size\n")
        window.expect("30 100")
        window.resize(rows=40, columns=90)
        window.send("stty size; echo $TERM-$((6*7))\n")
        window.expect("40 90")
        window.expect("-42")
        window.send("echo is $((7*8)); cat\n")
        window.expect("is 56")
        window.send("typed\n")
        window.expect(r"typed\s+typed")  # the program runs, and no longer the shell in its place
        window.send("\x03")  # which ends the program, and not the shell
        window.expect("# ")
        window.send("exit 5\n")
        assert window.wait() == 5


def test_a_command_ends_with_its_client(argv: Argv) -> None:
    # The name of a program is what `ps` in the guest shows of it.
    # The process that runs this test may ignore the signal, and its children inherit that.
    command = ["env", "--default-signal=INT", *argv("sleep", "123456")]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def is_running() -> bool:
        return "sleep 123456" in run(argv("ps")).stdout

    try:
        until(is_running, what="the command")
        client.send_signal(signal.SIGINT)
        assert client.wait(timeout=TIMEOUT_S) == 130
        until(lambda: not is_running(), what="the end of the command")
    finally:
        client.kill()
        client.communicate()


def test_a_host_that_does_not_allow_it_says_how(one_stack: Stack) -> None:
    """Also to a client whose input has ended already; gRPC forgets the reason if both sides send at once."""
    name = new_id()
    started = one_stack.containerd.run(IMAGE, name, "sleep", "100000", options=["--detach"])
    argv = [f"{SHIM_DIRECTORY}/hako", "exec", "--config", str(one_stack.config), name, "id"]
    try:
        assert started.code == 0, started.stderr
        refused = [run(argv) for _ in range(3)]
    finally:
        one_stack.containerd.remove(name)
    for done in refused:
        assert (done.returncode, done.stdout) == (1, "")
        [line] = done.stderr.splitlines()
        assert line.startswith(f"exec: {name}: commands in guests are not allowed on this host; set [guest] ")

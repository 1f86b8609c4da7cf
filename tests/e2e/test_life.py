"""A container as ``ctr run`` shows it: its kernel, its output and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import write_config
from tests.e2e.containerd import CALL_TIMEOUT_S, converse

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

GUEST_IMAGE = Path("/var/lib/hako/guest/image.json")


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_container_runs_on_the_guests_kernel_and_not_on_the_hosts(stack: Stack, container: str) -> None:
    result = stack.containerd.run(IMAGE, container, "uname", "-r")

    assert result.code == 0, result.stderr
    assert result.stderr == ""
    guest = json.loads(GUEST_IMAGE.read_bytes())["kernel_release"]
    assert result.stdout.strip() == (guest if stack.is_hako else os.uname().release)


@pytest.mark.parametrize(
    "code", [42, *(pytest.param(code, marks=pytest.mark.mostly_on("1.7-ttrpc")) for code in (0, 1))]
)
def test_the_exit_code_of_the_process_is_the_exit_code_of_ctr(
    stack: Stack, container: str, code: int
) -> None:
    assert stack.containerd.run(IMAGE, container, "sh", "-c", f"exit {code}").code == code


def test_a_process_killed_by_signal_9_exits_with_137(stack: Stack, container: str) -> None:
    argv = stack.containerd.run_argv(
        IMAGE, container, "sh", "-c", "echo ready; exec sleep 1000", options=["--rm"]
    )
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert stack.containerd.ctr("task", "kill", "--signal", "9", container).code == 0
        assert process.wait(CALL_TIMEOUT_S) == 137


def test_stdout_and_stderr_stay_apart(stack: Stack, container: str) -> None:
    result = stack.containerd.run(IMAGE, container, "sh", "-c", "echo to-stdout; echo to-stderr >&2")

    assert (result.stdout, result.stderr) == ("to-stdout\n", "to-stderr\n")


def test_stdin_reaches_the_process_and_its_end_is_seen(stack: Stack, container: str) -> None:
    assert converse(stack.containerd.run_argv(IMAGE, container, "cat", options=["--rm"])) == 0


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_megabyte_goes_in_and_comes_out_unchanged(stack: Stack, container: str) -> None:
    text = "".join(f"{number:07}\n" for number in range(131072))

    result = stack.containerd.run(IMAGE, container, "cat", stdin=text)

    assert len(result.stdout) == len(text)
    assert result.stdout == text


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_container_has_the_environment_and_directory_of_its_spec(stack: Stack, container: str) -> None:
    result = stack.containerd.run(
        IMAGE,
        container,
        "sh",
        "-c",
        "echo $GREETING; pwd; grep CapEff /proc/self/status",
        options=["--rm", "--env", "GREETING=hello", "--cwd", "/tmp"],
    )

    assert result.stdout.splitlines() == ["hello", "/tmp", "CapEff:\t00000000a80425fb"], result.stderr


@pytest.mark.hako
def test_a_container_can_have_a_configuration_of_its_own(
    stack: Stack, container: str, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "two.toml",
        state_directory=stack.state_directory,
        protocol=stack.protocol,
        hypervisor="vcpus = 2",
    )

    result = stack.containerd.run(
        IMAGE, container, "nproc", options=["--rm", "--runtime-config-path", config]
    )

    assert result.stdout == "2\n", result.stderr


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_container_writes_to_its_own_root_file_system(stack: Stack, container: str) -> None:
    first = stack.containerd.run(
        IMAGE, container, "sh", "-c", "echo mine > /tmp/file; cat /tmp/file; ls /tmp"
    )

    assert first.stdout == "mine\nfile\n", first.stderr


def test_a_task_started_detached_is_listed_killed_and_deleted(stack: Stack, container: str) -> None:
    containerd = stack.containerd
    started = containerd.run(IMAGE, container, "sleep", "1000", options=["--detach"])
    assert (started.code, started.stdout, started.stderr) == (0, "", "")

    pid, state = containerd.tasks()[container]
    assert (pid > 0, state) == (True, "RUNNING")
    pids = [int(line.split()[0]) for line in containerd.ctr("task", "ps", container).stdout.splitlines()[1:]]
    assert pid in pids
    os.kill(pid, 0)  # the process id is that of a real process of this machine

    refused = containerd.ctr("task", "delete", container)
    assert refused.code != 0
    assert containerd.ctr("task", "kill", "--signal", "9", container).code == 0
    containerd.wait_for_state(container, "STOPPED")
    deleted = containerd.ctr("task", "delete", container)
    assert "exit with non-zero exit code 137" in deleted.stderr or deleted.code == 137
    assert containerd.tasks() == {}
    assert containerd.ctr("container", "delete", container).code == 0


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_signal_reaches_the_process(stack: Stack, container: str) -> None:
    argv = stack.containerd.run_argv(
        IMAGE,
        container,
        "sh",
        "-c",
        "trap 'echo caught; exit 7' USR1; echo ready; while :; do sleep 1; done",
        options=["--rm"],
    )
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert stack.containerd.ctr("task", "kill", "--signal", "SIGUSR1", container).code == 0
        assert process.stdout.readline() == "caught\n"
        assert process.wait(CALL_TIMEOUT_S) == 7


def test_a_missing_program_is_an_error_of_create_that_names_it(stack: Stack, container: str) -> None:
    result = stack.containerd.run(IMAGE, container, "no-such-program")

    assert result.code == 1
    assert "no-such-program" in result.stderr
    assert "failed to create" in result.stderr or "create" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_unknown_image_is_refused_by_name(stack: Stack, container: str) -> None:
    result = stack.containerd.run("hako.test/unknown:1", container, "true")

    assert result.code == 1
    assert "hako.test/unknown:1" in result.stderr

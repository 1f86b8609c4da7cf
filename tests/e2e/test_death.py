"""What dies without warning is noticed at once, and what it leaves is cleaned."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako


def kill(stack: Stack, container: str, program: str) -> None:
    """Kill the process of a container's sandbox whose program has a name."""
    [victim] = [
        found
        for found in stack.containerd.nursery.descendants()
        if program in found.command and container in found.command and "setpriv" not in found.command
    ]
    os.kill(victim.pid, signal.SIGKILL)


def test_a_container_ends_with_137_when_its_machine_is_killed(stack: Stack, container: str):
    argv = stack.containerd.run_argv(
        IMAGE, container, "sh", "-c", "echo ready; exec sleep 1000", options=["--rm"]
    )
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        kill(stack, container, "qemu-system-x86_64")
        assert process.wait(20) == 137


def test_containerd_forgets_a_task_whose_shim_is_killed(stack: Stack, container: str):
    containerd = stack.containerd
    started = containerd.run(IMAGE, container, "sleep", "1000", options=["--detach", "--null-io"])
    assert started.code == 0, started.stderr

    kill(stack, container, "containerd-shim-hako-v2")

    containerd.wait_for_state(container, "GONE", timeout_s=20)
    assert containerd.ctr("container", "delete", container).code == 0

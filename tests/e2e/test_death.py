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


@pytest.mark.parametrize("program", ["qemu-system-x86_64", "containerd-shim-hako-v2"])
def test_a_container_ends_with_137_or_255_when_its_machine_or_shim_is_killed(
    stack: Stack, container: str, program: str
):
    argv = stack.containerd.run_argv(
        IMAGE, container, "sh", "-c", "echo ready; exec sleep 1000", options=["--rm"]
    )
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        [victim] = [
            found
            for found in stack.containerd.nursery.descendants()
            if program in found.command and container in found.command and "setpriv" not in found.command
        ]
        os.kill(victim.pid, signal.SIGKILL)
        assert process.wait(20) in (137, 255)

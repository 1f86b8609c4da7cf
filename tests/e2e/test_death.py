"""A sudden death of any process is noticed at once, and its remains are cleaned up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.containerd import SHIM_DIRECTORY
from tests.e2e.life import MOMENT_S, Life, until
from tests.patience import patient

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

ENDS_S = patient(30.0)  # far less than the minute after which a call to a guest is given up


def kill(stack: Stack, container: str, program: str) -> None:
    """Kill the process of a container's sandbox whose program has a name."""
    [victim] = [
        found
        for found in stack.containerd.nursery.descendants()
        if program in found.command and container in found.command and "setpriv" not in found.command
    ]
    os.kill(victim.pid, signal.SIGKILL)


def test_a_container_ends_with_137_when_its_machine_is_killed(stack: Stack, container: str) -> None:
    argv = stack.containerd.run_argv(
        IMAGE, container, "sh", "-c", "echo ready; exec sleep 1000", options=["--rm"]
    )
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        kill(stack, container, "qemu-system-x86_64")
        assert process.wait(MOMENT_S) == 137


def test_containerd_forgets_a_task_whose_shim_is_killed(stack: Stack, container: str) -> None:
    containerd = stack.containerd
    started = containerd.run(IMAGE, container, "sleep", "1000", options=["--detach", "--null-io"])
    assert started.code == 0, started.stderr

    kill(stack, container, "containerd-shim-hako-v2")

    containerd.wait_for_state(container, "GONE")
    assert containerd.ctr("container", "delete", container).code == 0
    kept = until(lambda: logs(stack, container), what="what is kept of it")
    assert " its shim died; " in kept
    assert f"sandbox {container}: ready" in kept


def logs(stack: Stack, sandbox_id: str) -> str:
    """What ``hako logs`` shows of a sandbox; nothing if there is none."""
    argv: list[str | Path] = [SHIM_DIRECTORY / "hako", "logs", sandbox_id, "--config", stack.config]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=MOMENT_S, check=False)
    return done.stdout


@pytest.mark.mostly_on("1.7-ttrpc")
@pytest.mark.parametrize(
    ("victim", "reason"),
    [
        ("guest", "guest panicked: .*sysrq triggered crash"),
        ("QEMU", "QEMU killed by signal 9"),
        ("virtio-fs daemon", "virtio-fs daemon (killed by signal 9|exited with status)"),
        ("vsock daemon", "vhost-device-vsock killed by signal 9"),
    ],
)
def test_every_task_of_a_sandbox_ends_at_once_and_an_operator_can_learn_why(
    stack: Stack, home: Path, victim: str, reason: str
) -> None:
    with Life(stack, home) as life:
        life.open_door()
        life.write_down()
        life.tasks.begin_create(life.id).result()
        life.tasks.call("Start", life.id)

        life.kill(victim)

        for name in life.all_ids:
            assert life.wait_for_state_of(name, {"STOPPED"}, timeout_s=ENDS_S) == ("STOPPED", 137)
        sandbox_id = life.all_ids[0]
        life.remove()
        life.wait_for_log(f"level=error .*sandbox {sandbox_id}: {reason}")
        for name in life.all_ids:
            life.wait_for_log(f"wait: container {name}: sandbox {sandbox_id}: {reason}.*; its status is 137")
        first, *console = logs(stack, sandbox_id).splitlines()
        assert re.search(reason, first)
        assert console or victim != "guest"  # a clone's has nothing of the boot
        assert all(line.startswith("console: ") for line in console)

"""A call on a task ends in time, even if other processes of the sandbox are dead or stopped."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from proto.containerd import task_v3_pb2
from tests.e2e.containerd import NAMESPACE, SHIM_DIRECTORY, SYSTEM_PATH
from tests.e2e.life import Life, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.mostly_on("1.7-ttrpc")]

VSOCK_BY_NIGHT = pytest.param("vsock daemon", marks=pytest.mark.nightly)

STATE_S = 0.5
KILL_S = 12.0
DELETE_S = 10.0  # containerd's CRI gives up on a task that has exited after as long
DELETE_PROGRAM_S = 1.0
KILLED = 128 + signal.SIGKILL


@pytest.fixture
def life(stack: Stack, home: Path) -> Iterator[Life]:
    """A container that runs."""
    with Life(stack, home) as begun:
        begun.write_down()
        begun.tasks.begin_create(begun.id).result()
        begun.tasks.call("Start", begun.id)
        yield begun


@pytest.mark.alone
def test_state_answers_at_once_while_the_guest_hangs(life: Life) -> None:
    life.signal("QEMU", signal.SIGSTOP)

    started = time.monotonic()
    assert life.tasks.state(life.id)[0] == "RUNNING"
    assert time.monotonic() - started < STATE_S
    life.signal("QEMU", signal.SIGCONT)
    life.remove()


@pytest.mark.parametrize("deaf", ["QEMU", "virtio-fs daemon", VSOCK_BY_NIGHT])
def test_sigkill_ends_a_task_while_a_process_of_its_sandbox_hangs(life: Life, deaf: str) -> None:
    life.signal(deaf, signal.SIGSTOP)

    started = time.monotonic()
    life.tasks.call("Kill", life.id, signal=signal.SIGKILL)
    assert life.wait_for_state({"STOPPED"}, timeout_s=KILL_S) == ("STOPPED", KILLED)
    assert time.monotonic() - started < KILL_S

    started = time.monotonic()
    life.tasks.call("Delete", life.id)
    assert time.monotonic() - started < DELETE_S
    life.remove()


@pytest.mark.parametrize("deaf", ["QEMU", "virtio-fs daemon", VSOCK_BY_NIGHT])
def test_a_stopped_task_can_be_deleted_while_a_process_of_its_sandbox_hangs(life: Life, deaf: str) -> None:
    life.tasks.call("Kill", life.id, signal=signal.SIGKILL)
    life.wait_for_state({"STOPPED"}, timeout_s=KILL_S)
    life.signal(deaf, signal.SIGSTOP)

    started = time.monotonic()
    assert life.tasks.call("Delete", life.id).exit_status == KILLED
    assert time.monotonic() - started < DELETE_S
    life.remove()


@pytest.mark.alone
def test_delete_of_a_dead_sandbox_takes_less_than_a_second_and_may_be_repeated(
    stack: Stack, life: Life, tmp_path: Path
) -> None:
    bundle = stack.containerd.state / "io.containerd.runtime.v2.task" / NAMESPACE / life.id
    state_directory = (bundle / "hako").readlink()
    stack.containerd.stop(how=signal.SIGKILL)  # so that it does not clean up
    life.signal("shim", signal.SIGKILL)
    until(lambda: not life.processes("qemu-system-x86_64"), what="QEMU died with its shim")
    assert state_directory.is_dir()

    for _ in range(2):
        started = time.monotonic()
        done = subprocess.run(
            [
                SHIM_DIRECTORY / "containerd-shim-hako-v2",
                *("-namespace", NAMESPACE, "-id", life.id, "-address", stack.containerd.address),
                *("-publish-binary", "/bin/true", "-bundle", bundle, "delete"),
            ],
            cwd=bundle,
            env={"PATH": SYSTEM_PATH, "HAKO_CONFIG": str(stack.config)},
            capture_output=True,
            check=False,
            timeout=20,
        )
        took = time.monotonic() - started
        assert (done.returncode, done.stderr) == (0, b"")
        assert task_v3_pb2.DeleteResponse.FromString(done.stdout).exit_status == KILLED
        assert took < DELETE_PROGRAM_S
        assert not state_directory.exists()

    stack.containerd.start()
    life.connect()
    assert life.tasks.state(life.id)[0] == "GONE"
    life.remove()

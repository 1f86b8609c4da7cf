"""A call on a task ends in time, even if other processes of the sandbox are dead or stopped."""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from proto.containerd import task_v3_pb2
from shim.sandbox.killing import ALONE_TIMEOUT_S
from tests.e2e.containerd import NAMESPACE, SHIM_DIRECTORY, SYSTEM_PATH, TIMEOUTS_S
from tests.e2e.life import Life, until
from tests.e2e.test_floods import ask_for_state, assert_in_time
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.mostly_on("1.7-ttrpc")]

VSOCK_BY_NIGHT = pytest.param("vsock daemon", marks=pytest.mark.nightly)

KILL_S = ALONE_TIMEOUT_S + patient(20.0)
DELETE_S = patient(10.0)  # containerd's CRI gives up on a task that has exited after as long
DELETE_PROGRAM_S = patient(TIMEOUTS_S["shim.cleanup"])
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

    took_s = list[float]()
    assert ask_for_state(life, took_s, for_s=1.0) == "RUNNING"
    assert_in_time(took_s)
    life.signal("QEMU", signal.SIGCONT)
    life.remove()


@pytest.mark.parametrize("deaf", ["QEMU", "virtio-fs daemon", VSOCK_BY_NIGHT])
def test_sigkill_ends_a_task_while_a_process_of_its_sandbox_hangs(life: Life, deaf: str) -> None:
    life.signal(deaf, signal.SIGSTOP)

    life.tasks.call("Kill", life.id, signal=signal.SIGKILL, timeout_s=KILL_S)
    assert life.wait_for_state({"STOPPED"}, timeout_s=KILL_S) == ("STOPPED", KILLED)
    life.tasks.call("Delete", life.id, timeout_s=DELETE_S)
    life.remove()


@pytest.mark.parametrize("deaf", ["QEMU", "virtio-fs daemon", VSOCK_BY_NIGHT])
def test_a_stopped_task_can_be_deleted_while_a_process_of_its_sandbox_hangs(life: Life, deaf: str) -> None:
    life.tasks.call("Kill", life.id, signal=signal.SIGKILL)
    life.wait_for_state({"STOPPED"}, timeout_s=KILL_S)
    life.signal(deaf, signal.SIGSTOP)

    assert life.tasks.call("Delete", life.id, timeout_s=DELETE_S).exit_status == KILLED
    life.remove()


@pytest.mark.alone
def test_delete_of_a_dead_sandbox_ends_before_containerd_kills_it_and_may_be_repeated(
    stack: Stack, life: Life, tmp_path: Path
) -> None:
    bundle = stack.containerd.state / "io.containerd.runtime.v2.task" / NAMESPACE / life.id
    state_directory = (bundle / "hako").readlink()
    stack.containerd.stop(how=signal.SIGKILL)  # so that it does not clean up
    life.signal("shim", signal.SIGKILL)
    until(lambda: not life.processes("qemu-system-x86_64"), what="QEMU died with its shim")
    assert state_directory.is_dir()

    for _ in range(2):
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
            timeout=DELETE_PROGRAM_S,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert task_v3_pb2.DeleteResponse.FromString(done.stdout).exit_status == KILLED
        assert not state_directory.exists()

    stack.containerd.start()
    life.connect()
    life.wait_for_state({"GONE"}, timeout_s=DELETE_S)
    life.remove()

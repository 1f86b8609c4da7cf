"""A process of the sandbox dies at any moment: containerd learns of it, and cleaning up leaves nothing."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import DEFAULT_BOOT_S, write_config
from tests.e2e.containerd import CALL_TIMEOUT_S
from tests.e2e.life import Life
from tests.e2e.tasks import outcomes
from tests.e2e.test_refusals import configured
from tests.patience import patient

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.mostly_on("1.7-ttrpc")]

CONSISTENT_S = patient(30.0)
CALLS_END_S = CALL_TIMEOUT_S

VICTIMS = ("shim", "QEMU", "virtio-fs daemon", "vsock daemon", "guest", "containerd")
PHASES = (
    "during start",
    "during create",
    "created",
    "running",
    "during exec",
    "paused",
    "stopping",
    "during delete",
)
BEFORE_THE_TASK_EXISTS = ("during start", "during create")
# A kernel that panics while it boots is the test below this one: no container can make it panic then.
IMPOSSIBLE = {("guest", "during start")}
MATRIX = [
    pair for pair in itertools.product(VICTIMS, PHASES) if pair not in IMPOSSIBLE and pair[0] != "containerd"
]
BOOTED_BY_DAY = (*BEFORE_THE_TASK_EXISTS, "running")
"""The phases in which a machine that boots is killed by day; clones die in the others."""


def by_day(*phases: str) -> list[ParameterSet]:
    """Return the matrix; what dies in other phases is for the night."""
    return [
        pytest.param(victim, phase, marks=() if phase in phases else pytest.mark.nightly)
        for victim, phase in MATRIX
    ]


def bring_to(life: Life, phase: str) -> list[Any]:
    """Bring a container to a phase.

    :returns: the calls that are under way then.
    """
    creating = life.tasks.begin_create(life.id)
    if phase in BEFORE_THE_TASK_EXISTS:
        if phase == "during create":
            life.wait_for_log(": ready")
        return [creating]
    creating.result()
    if phase == "created":
        return []
    life.tasks.call("Start", life.id)
    return further_to(life, phase)


def further_to(life: Life, phase: str) -> list[Any]:
    """Bring a running container to a phase, as :func:`bring_to` does."""
    match phase:
        case "during exec":
            life.tasks.add_exec(life.id, "extra", "sleep", "1000")
            return [life.tasks.begin("Start", life.id, exec_id="extra")]
        case "paused":
            life.tasks.call("Pause", life.id)
        case "stopping":
            return [life.tasks.begin("Kill", life.id, signal=signal.SIGKILL)]
        case "during delete":
            life.tasks.call("Kill", life.id, signal=signal.SIGKILL)
            life.wait_for_state({"STOPPED"}, timeout_s=CONSISTENT_S)
            return [life.tasks.begin("Delete", life.id)]
    return []


@pytest.mark.parametrize(("victim", "phase"), by_day(*BOOTED_BY_DAY))
def test_a_death_ends_the_task_once_and_leaves_nothing(
    stack: Stack, home: Path, victim: str, phase: str
) -> None:
    with configured(stack, hypervisor='template = "off"'):  # of clones is test_kill_matrix_of_clones.py
        see_a_death(stack, home, victim, phase, lasting={"STOPPED", "GONE"})


def see_a_death(stack: Stack, home: Path, victim: str, phase: str, *, lasting: set[str]) -> None:
    """Kill somebody at some moment of a container's life, and clean up as a user would.

    :param stack: where the container lives.
    :param home: a directory for FIFOs.
    :param victim: who is killed.
    :param phase: when.
    :param lasting: the states that the task may have then.
    """
    if victim == "vsock daemon" and Path("/dev/vhost-vsock").exists():
        pytest.skip("the host's kernel is the vsock device here, and there is no daemon")
    with Life(stack, home) as life:
        if victim == "guest":
            life.open_door()
        life.write_down()

        under_way = bring_to(life, phase)
        life.kill(victim)

        list(outcomes(under_way, timeout_s=CALLS_END_S))
        for name in life.all_ids:
            state, status = life.wait_for_state_of(name, lasting, timeout_s=CONSISTENT_S)
            if state == "CREATED":
                life.tasks.call("Kill", name, signal=signal.SIGKILL)
                state, status = life.wait_for_state_of(name, {"STOPPED"}, timeout_s=CONSISTENT_S)
            assert (state, status) in {("STOPPED", 128 + signal.SIGKILL), ("GONE", 0)}
        if phase not in BEFORE_THE_TASK_EXISTS:
            assert life.exits.wait_for(life.id, timeout_s=CONSISTENT_S)
        life.remove()
        exits = life.exits.of(life.id)
        assert set(exits) <= {128 + signal.SIGKILL}
        # containerd itself reports the exit of a task that it still has when its shim is gone.
        assert len(exits) <= (2 if victim == "shim" and phase in {"stopping", "during delete"} else 1)
        if (victim, phase) == ("shim", "during start"):
            # containerd runs no cleanup for a shim that dies before it was connected to: what it left behind
            # is undone by the next start of the same name.
            again = stack.containerd.run(IMAGE, life.id, "true")
            assert again.code == 0, again.stderr


@pytest.mark.parametrize("phase", PHASES)
def test_a_restarted_containerd_takes_a_task_up_where_it_was(stack: Stack, home: Path, phase: str) -> None:
    with Life(stack, home) as life:
        life.write_down()
        under_way = bring_to(life, phase)
        life.kill("containerd")
        list(outcomes(under_way, timeout_s=CALLS_END_S))  # a call may have been faster than the signal

        stack.containerd.start()
        life.connect()

        expected = {
            "during start": {"GONE", "CREATED"},
            "during create": {"GONE", "CREATED"},
            "created": {"CREATED"},
            "running": {"RUNNING"},
            "during exec": {"RUNNING"},
            "paused": {"PAUSED"},
            "stopping": {"RUNNING", "STOPPED", "GONE"},
            "during delete": {"STOPPED", "GONE"},
        }
        state, status = life.wait_for_state(expected[phase], timeout_s=CONSISTENT_S)
        if state in {"CREATED", "RUNNING", "PAUSED"}:
            life.tasks.call("Kill", life.id, signal=signal.SIGKILL)
            _, status = life.wait_for_state({"STOPPED"}, timeout_s=CONSISTENT_S)
            assert life.exits.wait_for(life.id, timeout_s=CONSISTENT_S)
            assert status == 128 + signal.SIGKILL
        life.remove()
        exits = life.exits.of(life.id)
        assert set(exits) <= {128 + signal.SIGKILL}
        # 1.6 does not end a shim that has just deleted its container. The shim ends on its own, and
        # containerd logs the loss as for every shim.
        is_told_twice = stack.containerd.release.name == "1.6" and phase == "during delete"
        assert len(exits) <= (2 if is_told_twice else 1)


def test_a_kernel_that_panics_while_it_boots_fails_the_create(
    stack: Stack, home: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "panic.toml",
        state_directory=stack.state_directory,
        protocol=stack.protocol,
        guest='kernel_parameters = "rdinit=/none init=/none root=/dev/none"\n'
        f"boot_timeout_s = {patient(DEFAULT_BOOT_S):.0f}",
    )
    with Life(stack, home) as life:
        life.write_down("--runtime-config-path", config)
        with pytest.raises(grpc.RpcError, match="panic"):
            life.tasks.begin_create(life.id).result()

        assert life.wait_for_state({"GONE"}, timeout_s=CONSISTENT_S) == ("GONE", 0)
        life.remove()
        assert life.exits.of(life.id) == []

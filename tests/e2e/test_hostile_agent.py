"""A guest whose agent was taken over costs the host little, and its containers can still be removed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.config import GuestConfig
from tests.e2e import hostile_agent
from tests.e2e.life import MOMENT_S, Life
from tests.e2e.test_floods import MOST_GROWTH_KIB, ask_for_state, assert_in_time, resident_kib
from tests.e2e.test_refusals import configured

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.timeout(240)]

HOSTILE_S = 5.0
#: What the agent sends, and whether the machine is ended for that. One that is only slow may be busy.
MODES = {"junk": True, "huge": True, "large": True, "many": True, "calls": True, "silent": False}
BY_DAY = "many"


@pytest.fixture(scope="module")
def initrd(home: Path) -> Path:
    """A guest image with the hostile agent."""
    path = home / "hostile-initrd"
    hostile_agent.write_initrd(Path(GuestConfig().initrd).parent, path)
    return path


@pytest.mark.alone
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode == BY_DAY else pytest.mark.nightly) for mode in MODES]
)
def test_a_hostile_agent_holds_nobody_up(one_stack: Stack, home: Path, initrd: Path, mode: str) -> None:
    guest = f'initrd = "{initrd}"\nkernel_parameters = "{hostile_agent.PARAMETER}{mode}"\n'
    with configured(one_stack, guest=guest), Life(one_stack, home) as life:
        life.write_down()
        life.tasks.begin_create(life.id).result()
        pids = [life.pid(name) for name in ("shim", "QEMU", "vsock daemon")]
        before = {pid: resident_kib(pid) for pid in pids}
        life.tasks.call("Start", life.id)

        most, state, took_s = 0, "", list[float]()
        ends_at = time.monotonic() + (MOMENT_S if MODES[mode] else HOSTILE_S)
        while state != "STOPPED" and time.monotonic() < ends_at:
            state = ask_for_state(life, took_s, for_s=0.1)
            most = max(most, *(resident_kib(pid) - size for pid, size in before.items()))
        assert_in_time(took_s)
        assert most < MOST_GROWTH_KIB
        assert (state == "STOPPED") == MODES[mode]
        life.remove()

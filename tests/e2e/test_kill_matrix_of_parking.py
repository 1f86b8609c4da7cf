"""If a process of a parked sandbox dies, its task ends once and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.errors import ShimError
from tests.e2e.life import Life
from tests.e2e.test_kill_matrix import CONSISTENT_S
from tests.patience import patient

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future
    from pathlib import Path

    from google.protobuf.message import Message

    from shim.host.state_directory import StartRecord
    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

CALL_S = patient(60.0)
VICTIMS = ("shim", "QEMU", "virtio-fs daemon", "vsock daemon")
PHASES = ("while it is parked", "parked", "while it wakes")
BY_DAY = ("QEMU", "parked")
MATRIX = [
    pytest.param(*pair, marks=() if pair == BY_DAY else pytest.mark.nightly)
    for pair in itertools.product(VICTIMS, PHASES)
]


def ask(record: StartRecord, method: str, request: Message, reply: type[Message]) -> None:
    with contextlib.suppress(ShimError):  # the shim may be what dies
        asyncio.run(shims.ask(record, method, request, reply, timeout_s=CALL_S))


def bring_to(life: Life, record: StartRecord, phase: str, pool: Executor) -> Future[None]:
    """Bring a running container to a phase; return the call that is under way then."""
    parking = pool.submit(ask, record, "Park", api.ParkRequest(), api.ParkResponse)
    if phase != PHASES[0]:
        parking.result()
    if phase == PHASES[2]:
        parking = pool.submit(ask, record, "Unpark", api.UnparkRequest(), api.UnparkResponse)
    if phase != PHASES[1]:
        life.pid("copier")
    return parking


@pytest.mark.parametrize(("victim", "phase"), MATRIX)
def test_a_death_ends_a_parked_task_once_and_leaves_nothing(
    one_stack: Stack, home: Path, victim: str, phase: str
) -> None:
    with Life(one_stack, home) as life, ThreadPoolExecutor() as pool:
        life.write_down()
        life.tasks.begin_create(life.id).result()
        life.tasks.call("Start", life.id)
        known = shims.records(str(one_stack.state_directory))
        under_way = bring_to(life, next(each for each in known if each.id == life.id), phase, pool)

        life.kill(victim)

        under_way.result(CALL_S)
        state, status = life.wait_for_state({"STOPPED", "GONE"}, timeout_s=CONSISTENT_S)
        assert (state, status) in {("STOPPED", 128 + signal.SIGKILL), ("GONE", 0)}
        assert life.exits.wait_for(life.id, timeout_s=CONSISTENT_S)
        life.remove()
        assert life.exits.of(life.id) == [128 + signal.SIGKILL]

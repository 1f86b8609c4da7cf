"""A sandbox reports its machine's state, from the boot to the end."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor import VmStartError
from shim.config import Config
from shim.errors import AlreadyExists, FailedPrecondition, Internal, Unavailable
from shim.host.state_directory import StartRecord
from shim.machine import clock
from shim.machine.pod import from_oci
from shim.machine.rest import Rest
from shim.sandbox.context import Context
from shim.sandbox.life import Life
from shim.sandbox.sandbox import Sandbox
from shim.sandbox.work import Work
from shim.telemetry.events import Publisher
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

POD = from_oci({})


class Machine:
    """A machine that boots and ends when a test says so."""

    pid = 7

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.up: asyncio.Future[Any] = loop.create_future()
        self.gone: asyncio.Future[str] = loop.create_future()
        self.kept: list[str] = []
        self.cloning = SimpleNamespace(build_what_lacks=None, outcome="")

    async def boot(self, _pod: object) -> Any:
        return await self.up

    async def reason_of_end(self, _running: object) -> str:
        return await self.gone

    def come_up(self) -> None:
        async def aclose() -> None:
            return

        agent = SimpleNamespace(is_hako=False, aclose=aclose)
        self.up.set_result(SimpleNamespace(agent=agent, parking=SimpleNamespace(rest=Rest.AWAKE)))

    async def switch_off(self, reason: str) -> None:
        if not self.gone.done():
            self.gone.set_result(f"switched off: {reason}")
        if not self.up.done():
            self.up.set_exception(Unavailable(f"switched off: {reason}"))

    async def kill(self) -> None:
        return

    async def clear_away(self) -> None:
        return

    def keep_reason(self, reason: str, *, namespace: str) -> None:
        self.kept.append(f"{namespace}: {reason}")


class Nursery:
    """A sandbox, its machine, and their tasks."""

    def __init__(self, directory: Path, group: asyncio.TaskGroup) -> None:
        record = StartRecord(
            grpc_address="",
            ttrpc_address="",
            publish_binary="",
            config_text="",
            config_source="",
            socket_path="",
            namespace="tests",
            id="box",
            bundle=str(directory),
            protocol="ttrpc",
            state_directory=str(directory),
            debug=False,
            dialect="1.7",
            started_at=1.0,
        )
        context: Any = Context(
            record=record,
            config=Config(),
            ledger=SimpleNamespace(),  # type: ignore[arg-type]  # not used
            publisher=Publisher("", namespace="tests"),
            work=Work(group),
            leave=lambda: None,
        )
        self.machine = Machine()
        self.sandbox = Sandbox(context, self.machine)  # type: ignore[arg-type]  # a stand-in with the methods that are used

    async def up(self) -> None:
        self.sandbox.start(POD)
        self.machine.come_up()
        await self.sandbox.running()


@pytest.fixture
async def nursery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nursery]:
    async def keep(_agent: object, *, pid: int, right: asyncio.Event) -> None:
        assert pid == Machine.pid
        right.set()

    monkeypatch.setattr(clock, "keep", keep)
    async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as group:
        made = Nursery(tmp_path, group)
        yield made
        await made.sandbox.stop()


async def test_before_create_there_is_no_machine_to_wait_for(nursery: Nursery) -> None:
    with pytest.raises(FailedPrecondition, match=r"^sandbox box: not created yet; call CreateSandbox first$"):
        await nursery.sandbox.running()
    assert not nursery.sandbox.is_ready
    assert nursery.sandbox.reason_of_end == ""


async def test_callers_wait_until_the_machine_runs(nursery: Nursery) -> None:
    nursery.sandbox.start(POD)
    waiting = asyncio.ensure_future(nursery.sandbox.running())
    with pytest.raises(Unavailable, match="still boots; ask again"):
        await nursery.sandbox.ping()
    assert not waiting.done()

    nursery.machine.come_up()

    assert await waiting is nursery.machine.up.result()
    assert nursery.sandbox.is_ready
    assert nursery.sandbox.state is Life.RUNNING


async def test_a_failed_boot_is_reported_with_its_reason(nursery: Nursery) -> None:
    nursery.sandbox.start(POD)
    nursery.machine.up.set_exception(VmStartError("start: QEMU: no such file"))
    with pytest.raises(Internal, match=r"^boot: sandbox box: start: QEMU: no such file$"):
        await nursery.sandbox.running()
    assert nursery.sandbox.state is Life.DIED
    assert nursery.machine.kept == ["tests: boot: sandbox box: start: QEMU: no such file"]


async def test_every_caller_gets_the_reason_for_a_machines_death(
    nursery: Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    await nursery.up()
    with caplog.at_level(logging.INFO):
        nursery.machine.gone.set_result("guest panicked: oops")
        await nursery.sandbox.ended.wait()
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"^sandbox box: guest panicked: oops$"):
            await nursery.sandbox.running()
    assert nursery.sandbox.reason_of_end == "sandbox box: guest panicked: oops"
    assert nursery.sandbox.exit_status == 137
    assert nursery.machine.kept == ["tests: sandbox box: guest panicked: oops"]
    assert ("ERROR", "sandbox box: guest panicked: oops") in [
        (record.levelname, record.message) for record in caplog.records
    ]


async def test_a_requested_end_is_not_a_failure(nursery: Nursery) -> None:
    await nursery.up()
    await nursery.sandbox.end()
    assert nursery.sandbox.state is Life.STOPPED
    assert nursery.sandbox.exit_status == 0
    assert nursery.machine.kept == []
    await nursery.sandbox.end()


async def test_a_machine_answers_until_its_requested_end(nursery: Nursery) -> None:
    await nursery.up()
    nursery.sandbox.expect_end()
    assert nursery.sandbox.state is Life.ENDING
    assert await nursery.sandbox.running() is nursery.machine.up.result()


async def test_a_machine_can_be_stopped_while_it_boots(nursery: Nursery) -> None:
    nursery.sandbox.start(POD)
    await nursery.sandbox.end()
    assert nursery.sandbox.state is Life.STOPPED
    with pytest.raises(Unavailable, match="its end was asked for"):
        await nursery.sandbox.running()


async def test_a_sandbox_that_was_never_created_ends_at_once(nursery: Nursery) -> None:
    await nursery.sandbox.end()
    assert nursery.sandbox.ended.is_set()
    assert nursery.sandbox.exit_status == 0
    with pytest.raises(FailedPrecondition, match="its end was asked for"):
        nursery.sandbox.hold(POD)


async def test_the_sandbox_service_creates_only_one_machine(nursery: Nursery) -> None:
    nursery.sandbox.hold(POD)
    with pytest.raises(AlreadyExists, match=r"^create: sandbox box: already exists$"):
        nursery.sandbox.hold(POD)
    nursery.sandbox.release()
    assert not nursery.sandbox.is_held


async def test_background_tasks_end_with_the_machine(nursery: Nursery) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def accompany(running: object) -> None:
        assert running is nursery.machine.up.result()
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    nursery.sandbox.while_running(accompany, name="test")
    await nursery.up()
    await begun.wait()
    nursery.machine.gone.set_result("it is over")
    await ended.wait()

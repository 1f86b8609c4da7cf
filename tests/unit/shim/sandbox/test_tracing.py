"""A start that fails is sent as a trace, and its error goes on to containerd at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from shim.errors import AlreadyExists, Unavailable
from shim.sandbox.tracing import Tracing
from shim.sandbox.work import Work
from tests.waiting import settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from shim.telemetry.timeline_files import SandboxTimeline
    from shim.telemetry.trace_export import Failure, TraceExport


class Traces:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Failure | None, Failure | None]] = []
        self.may_go = asyncio.Event()

    async def send(
        self,
        container_id: str,
        attributes: dict[str, str],
        *,
        failure: Failure | None = None,
        sandbox_failure: Failure | None = None,
    ) -> None:
        assert attributes == {"hako.sandbox.id": "box"}
        await self.may_go.wait()
        self.sent.append((container_id, failure, sandbox_failure))


class Sandbox:
    """What a sandbox gives to its tracing."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self.traces = Traces()
        self.written = 0
        self.has_failed = False
        self._group = group

    def tracing(self, *, wanted: bool = True) -> Tracing:
        return Tracing(
            cast("TraceExport", self.traces) if wanted else None,
            timeline=cast("SandboxTimeline", SimpleNamespace(write=self._write)),
            work=Work(self._group),
            attributes={"hako.sandbox.id": "box"},
            sandbox_has_failed=lambda: self.has_failed,
        )

    def _write(self) -> None:
        self.written += 1

    async def sent(self) -> list[tuple[str, Failure | None, Failure | None]]:
        self.traces.may_go.set()
        await settle()
        return self.traces.sent


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with asyncio.TaskGroup() as group:
        yield Sandbox(group)


def fail(tracing: Tracing, container_id: str, error: BaseException) -> None:
    with pytest.raises(type(error)), tracing.failures(container_id):
        raise error


async def test_the_trace_of_a_failed_container_is_sent_after_its_error(sandbox: Sandbox) -> None:
    error = Unavailable("create: gone")
    fail(sandbox.tracing(), "one", error)
    assert (sandbox.written, sandbox.traces.sent) == (1, []), "the phases are written, and nobody waits"

    [(container, failure, sandbox_failure)] = await sandbox.sent()
    assert failure is not None
    assert (container, failure.error, sandbox_failure) == ("one", error, None)
    assert failure.began_s <= failure.ended_s


@pytest.mark.parametrize(("container", "has_failed"), [("one", True), ("", True), ("", False)])
async def test_a_sandbox_has_failed_if_its_machine_is_not_up_or_its_own_request_fails(
    sandbox: Sandbox, *, container: str, has_failed: bool
) -> None:
    sandbox.has_failed = has_failed
    fail(sandbox.tracing(), container, Unavailable("boot: gone"))

    [(_, failure, sandbox_failure)] = await sandbox.sent()
    assert (failure is not None, sandbox_failure is not None) == (bool(container), True)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), OSError("unforeseen")])
async def test_a_start_that_is_given_up_or_breaks_is_sent_too(sandbox: Sandbox, error: Any) -> None:
    fail(sandbox.tracing(), "one", error)

    [(_, failure, _)] = await sandbox.sent()
    assert failure is not None
    assert failure.described()["type"] == type(error).__name__
    assert failure.described()["text"]


async def test_a_success_and_a_name_that_is_taken_are_not_sent_as_failures(sandbox: Sandbox) -> None:
    tracing = sandbox.tracing()
    fail(tracing, "one", AlreadyExists("create: one: already exists"))
    with tracing.failures("one"):
        pass

    assert await sandbox.sent() == []


async def test_nothing_is_written_for_operators_who_want_no_traces(sandbox: Sandbox) -> None:
    tracing = sandbox.tracing(wanted=False)
    fail(tracing, "one", Unavailable("create: gone"))
    await tracing.send("one")

    assert (await sandbox.sent(), sandbox.written) == ([], 0)

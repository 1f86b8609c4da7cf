"""A sandbox's shim ends at the right time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from shim.sandbox.containers import Containers
from shim.sandbox.work import Work
from shim.telemetry.event_feed import EventFeed
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class HeldSandbox:
    """A sandbox that containerd's sandbox service may hold."""

    def __init__(self, group: asyncio.TaskGroup, *, is_held: bool) -> None:
        self.id = "pod"
        self.is_held = is_held
        self.work = Work(group)
        self.calls: list[str] = []

    def while_running(self, _work: object, *, name: str) -> None:
        assert name

    def expect_end(self) -> None:
        self.calls.append("expect the end")

    async def end(self) -> None:
        self.calls.append("end")

    def release(self) -> None:
        self.calls.append("release")


class Ended:
    """A container that has ended and can be deleted."""

    def __init__(self, name: str, containers: Containers) -> None:
        self.id = name
        self.init = SimpleNamespace(ended=asyncio.Event(), exited=asyncio.Event())
        self.execs: dict[str, object] = {}
        self._containers = containers

    async def delete(self) -> None:
        self._containers.forget(self.id)


class Shim:
    """A sandbox's containers, and whether its shim may leave."""

    def __init__(
        self, group: asyncio.TaskGroup, *names: str, version: int = 3, is_held: bool = False
    ) -> None:
        self.has_left = False
        self.sandbox = cast("Any", HeldSandbox(group, is_held=is_held))
        context: Any = SimpleNamespace(
            record=SimpleNamespace(version=version),
            publisher=SimpleNamespace(feed=EventFeed()),
            ledger=SimpleNamespace(deleted=lambda _name: None),
            leave=self._leave,
        )
        volumes: Any = SimpleNamespace(bound_files=None)
        self.containers = Containers(context, self.sandbox, volumes)
        everyone: dict[str, Any] = self.containers.all
        everyone |= {name: Ended(name, self.containers) for name in names}

    def _leave(self) -> None:
        self.has_left = True


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Shim]]:
    async with asyncio.timeout(WITHIN_S), asyncio.TaskGroup() as group:
        yield lambda *names, **settings: Shim(group, *names, **settings)


async def test_a_shim_without_containers_ends_when_it_is_told_to(make: Callable[..., Shim]) -> None:
    shim = make()
    shim.containers.shut_down()
    assert shim.has_left


async def test_a_shim_with_a_container_stays(make: Callable[..., Shim]) -> None:
    shim = make("web")
    shim.containers.shut_down()
    assert not shim.has_left


async def test_a_shim_that_the_sandbox_service_uses_stays(make: Callable[..., Shim]) -> None:
    shim = make(is_held=True)
    shim.containers.shut_down()
    assert not shim.has_left


async def test_a_dismissed_shim_ends_with_its_last_container(make: Callable[..., Shim]) -> None:
    shim = make("web")
    shim.containers.shut_down()
    await shim.containers.delete("web")
    assert shim.has_left


async def test_a_shim_that_gets_a_start_per_container_waits_for_the_next(
    make: Callable[..., Shim],
) -> None:
    shim = make("web", version=2)
    shim.containers.shut_down()
    await shim.containers.delete("web")
    assert not shim.has_left


async def test_a_shim_outlives_its_last_container_until_it_is_told_to_end(make: Callable[..., Shim]) -> None:
    shim = make("web")
    await shim.containers.delete("web")
    assert not shim.has_left


async def test_a_dismissed_sandbox_ends_its_machine_before_its_shim(
    make: Callable[..., Shim],
) -> None:
    shim = make("web", is_held=True)
    await shim.containers.dismiss()
    assert shim.sandbox.calls == ["expect the end", "end", "release"]
    assert shim.has_left


@pytest.mark.parametrize(
    ("others", "is_held", "expected"),
    [((), False, False), (("db",), False, True), ((), True, True)],
    ids=["alone", "with another", "held"],
)
async def test_a_machine_is_in_use_by_another_container_or_the_sandbox_service(
    make: Callable[..., Shim], others: tuple[str, ...], is_held: bool, expected: bool
) -> None:
    shim = make("web", *others, is_held=is_held)
    assert shim.containers.has_other_uses("web") is expected

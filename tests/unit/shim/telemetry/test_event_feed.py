"""A follower of a sandbox gets its last events, then each new one."""

from __future__ import annotations

import contextlib

import pytest

from proto.containerd import events_pb2
from shim.errors import ResourceExhausted
from shim.telemetry import event_feed
from shim.telemetry.event_feed import EventFeed


async def told(feed: EventFeed) -> list[str]:
    return [event.topic async for event in feed.events(follow=False)]


async def test_the_last_events_are_kept() -> None:
    feed = EventFeed()
    for number in range(event_feed.KEPT + 2):
        feed.note(f"/tasks/{number}")

    assert await told(feed) == [f"/tasks/{number}" for number in range(2, event_feed.KEPT + 2)]


async def test_an_event_names_its_process_and_its_exit_status() -> None:
    feed = EventFeed()
    feed.note("/tasks/exit", events_pb2.TaskExit(container_id="c", id="c", exit_status=3))
    feed.note("/tasks/exit", events_pb2.TaskExit(container_id="c", id="e", exit_status=4))
    feed.note("/tasks/exec-added", events_pb2.TaskExecAdded(container_id="c", exec_id="e"))

    found = [event async for event in feed.events(follow=False)]

    assert [(each.container_id, each.exec_id, each.exit_status) for each in found] == [
        ("c", "", 3),
        ("c", "e", 4),
        ("c", "e", 0),
    ]
    assert [each.number for each in found] == [1, 2, 3]


async def test_a_follower_gets_each_event_once_and_in_order() -> None:
    feed = EventFeed()
    feed.note("/first")
    async with contextlib.aclosing(feed.events(follow=True)) as events:
        seen = [(await anext(events)).topic]
        feed.note("/second")
        feed.note("/third")
        seen += [(await anext(events)).topic, (await anext(events)).topic]

    assert seen == ["/first", "/second", "/third"]
    feed.note("/fourth")  # no follower is left
    assert await told(feed) == ["/first", "/second", "/third", "/fourth"]


async def test_a_slow_follower_is_told_that_it_lost_events() -> None:
    feed = EventFeed()
    feed.note("/first")
    async with contextlib.aclosing(feed.events(follow=True)) as events:
        await anext(events)
        for _ in range(5000):
            feed.note("/flood")
        for _ in range(1024):
            await anext(events)
        feed.note("/flood")

        with pytest.raises(ResourceExhausted):
            await anext(events)

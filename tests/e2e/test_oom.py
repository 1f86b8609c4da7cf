"""A process that the guest's kernel kills for memory: its exit, and the event for containerd."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

LIMIT_BYTES = 32 << 20
HOG = ("tail", "/dev/zero")  # keeps the one endless line in memory


@pytest.fixture
def container(one_stack: Stack) -> Iterator[str]:
    """An unused container id; the container is removed."""
    name = new_id()
    yield name
    if name in one_stack.containerd.containers():
        one_stack.containerd.remove(name)


def topics_until(events: subprocess.Popen[str], topic: str, container: str) -> list[str]:
    """Read the events of a container, as ``ctr events`` prints them, up to the first of a topic."""
    seen = []
    assert events.stdout is not None
    for line in events.stdout:
        words = line.split()
        payload = json.loads(line[line.index("{") :])
        if container in {payload.get("container_id"), payload.get("id")}:
            seen.append(next(word for word in words if word.startswith("/")))
            if seen[-1] == topic:
                break
    return seen


def test_a_process_over_its_memory_limit_is_killed_and_containerd_hears_of_it_first(
    one_stack: Stack, container: str
) -> None:
    containerd = one_stack.containerd
    options = ["--rm", "--memory-limit", str(LIMIT_BYTES)]
    with subprocess.Popen(containerd.ctr_argv("events"), stdout=subprocess.PIPE, text=True) as events:
        try:
            result = containerd.run(IMAGE, container, *HOG, options=options)
            topics = topics_until(events, "/tasks/delete", container)
        finally:
            events.kill()
    assert result.code == 137, result.stderr
    assert topics.index("/tasks/oom") < topics.index("/tasks/exit")
    assert topics.count("/tasks/oom") == 1


def test_a_kill_in_an_exec_is_reported_and_the_container_lives_on(one_stack: Stack, container: str) -> None:
    containerd = one_stack.containerd
    options = ["--detach", "--memory-limit", str(LIMIT_BYTES)]
    started = containerd.run(IMAGE, container, "sleep", "1000", options=options)
    assert started.code == 0, started.stderr
    with subprocess.Popen(containerd.ctr_argv("events"), stdout=subprocess.PIPE, text=True) as events:
        try:
            assert containerd.exec(container, "hog", *HOG).code == 137
            topics = topics_until(events, "/tasks/exit", container)
        finally:
            events.kill()
    assert topics[-2:] == ["/tasks/oom", "/tasks/exit"]
    assert containerd.tasks()[container][1] == "RUNNING"

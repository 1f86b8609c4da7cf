"""A process that the guest's kernel kills for memory: its exit, and the event for containerd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.tasks import Exits, Tasks

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


def test_a_process_over_its_memory_limit_is_killed_and_containerd_hears_of_it_first(
    one_stack: Stack, container: str
) -> None:
    containerd = one_stack.containerd
    options = ["--rm", "--memory-limit", str(LIMIT_BYTES)]
    exits = Exits()
    with Tasks(containerd.address) as tasks:
        tasks.subscribe(exits)
        result = containerd.run(IMAGE, container, *HOG, options=options)
        topics = exits.topics_until("/tasks/delete", container)
    assert result.code == 137, result.stderr
    assert topics.index("/tasks/oom") < topics.index("/tasks/exit")
    assert topics.count("/tasks/oom") == 1


def test_a_kill_in_an_exec_is_reported_and_the_container_lives_on(one_stack: Stack, container: str) -> None:
    containerd = one_stack.containerd
    options = ["--detach", "--memory-limit", str(LIMIT_BYTES)]
    started = containerd.run(IMAGE, container, "sleep", "1000", options=options)
    assert started.code == 0, started.stderr
    exits = Exits()
    with Tasks(containerd.address) as tasks:
        tasks.subscribe(exits)
        assert containerd.exec(container, "hog", *HOG).code == 137
        topics = exits.topics_until("/tasks/exit", container)
    assert topics == ["/tasks/oom", "/tasks/exit"]
    assert containerd.tasks()[container][1] == "RUNNING"

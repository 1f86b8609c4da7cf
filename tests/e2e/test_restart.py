"""A shim outlives its containerd."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGTERM, id="stopped", marks=pytest.mark.mostly_on("1.7-ttrpc")),
        pytest.param(signal.SIGKILL, id="killed"),
    ],
)
def test_a_detached_container_survives_a_restart_of_containerd(
    stack: Stack, container: str, how: signal.Signals
):
    containerd = stack.containerd
    started = containerd.run(IMAGE, container, "sleep", "1000", options=["--detach"])
    assert started.code == 0, started.stderr
    before = containerd.tasks()[container]

    containerd.stop(how=how)
    os.kill(before[0], 0)
    containerd.start()

    assert containerd.tasks()[container] == before
    assert containerd.exec(container, "after", "echo", "alive").stdout == "alive\n"
    assert containerd.ctr("task", "kill", "--signal", "9", container).code == 0
    containerd.wait_for_state(container, "STOPPED")
    assert "137" in containerd.ctr("task", "delete", container).stderr
    assert containerd.ctr("container", "delete", container).code == 0

"""A pod's machine has room for its containers from the start, and follows their limits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.cri.conftest import counted
from tests.cri.pods import remove_all, run_pod
from tests.patience import patient

if TYPE_CHECKING:
    from tests.cri.pods import Container
    from tests.cri.stack import Stack

MIB = 1 << 20
SETTLED_S = patient(60.0)
"""A guest that has given memory back counts some of it twice until it has taken its block away, too."""
ONE_CPU = {"cpu_quota": 100_000, "cpu_period": 100_000}


def seen(container: Container) -> tuple[int, int]:
    """Ask a container for its machine's processors and memory, in MiB."""
    processors, _, kib, _ = container.shell("nproc; grep MemTotal /proc/meminfo").stdout.split()
    return int(processors), round(int(kib) / 1024)


def settled(container: Container, expected: int) -> int:
    """Ask a container for its machine's memory, in MiB, until it is what is expected or time is up."""
    deadline = time.monotonic() + SETTLED_S
    while (now := seen(container)[1]) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return now


@pytest.mark.mainly
def test_the_machine_follows_its_pod_and_its_containers(stack: Stack) -> None:
    if not stack.is_hako:
        pytest.skip("containers of this runtime share the host")
    resources = {**ONE_CPU, "memory_limit_in_bytes": 128 * MIB}
    pods = []
    with counted(stack):
        try:
            pods.append(run_pod(stack, "sized", resources=resources))
            first = pods[0].run("first", "sleep", "100000", linux={"resources": resources})
            processors, memory = seen(first)
            assert processors == 2  # its own and the container's, from the boot on
            second = pods[0].run("second", "sleep", "100000", linux={"resources": resources})
            assert settled(first, memory + 128) == memory + 128
            assert seen(first)[0] == processors  # the host has no third processor to give
            for limit in (64, 192, 128):
                changed = {"memory_limit_in_bytes": limit * MIB}
                stack.cri.call("UpdateContainerResources", container_id=second.id, linux=changed)
                assert settled(first, memory + limit) == memory + limit
            second.stop(grace_s=0)
            second.remove()
            third = pods[0].run("third", "sleep", "100000")
            assert settled(third, memory) == memory
        finally:
            remove_all(pods)

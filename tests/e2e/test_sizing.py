"""The machine has the size that its containers need: it follows their limits, up and down."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.tasks import Tasks
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

MIB = 1 << 20
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
UPDATE_TIMEOUT_S = patient(60)


@pytest.fixture
def container(one_stack: Stack) -> Iterator[str]:
    """An unused container id; the container is removed."""
    name = new_id()
    yield name
    if name in one_stack.containerd.containers():
        one_stack.containerd.remove(name)


def seen(stack: Stack, container: str) -> tuple[int, int]:
    """Ask the container for its machine's processors and memory, in MiB."""
    script = "nproc; grep MemTotal /proc/meminfo"
    result = stack.containerd.ctr("tasks", "exec", "--exec-id", new_id(), container, "sh", "-c", script)
    assert result.code == 0, result.stderr
    processors, _, kib, _ = result.stdout.split()
    return int(processors), round(int(kib) / 1024)


def test_an_update_moves_the_machine_and_the_containers_limits(one_stack: Stack, container: str) -> None:
    containerd = one_stack.containerd
    limits = ["--memory-limit", str(128 * MIB), "--cpu-quota", "50000", "--cpu-period", "100000"]
    own_group = ["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"]
    options = ["--detach", *limits, *own_group]
    started = containerd.run(IMAGE, container, "sleep", "1000", options=options)
    assert started.code == 0, started.stderr
    processors, memory = seen(one_stack, container)
    assert processors == 2

    def update(**resources: Any) -> None:
        value = {"type_url": RESOURCES, "value": json.dumps(resources).encode()}
        with Tasks(containerd.address) as tasks:
            tasks.call("Update", container, resources=value, timeout_s=UPDATE_TIMEOUT_S)

    def limits_there() -> list[str]:
        files = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max"]
        result = containerd.ctr("tasks", "exec", "--exec-id", new_id(), container, "cat", *files)
        assert result.code == 0, result.stderr
        return result.stdout.split()

    assert limits_there() == [str(128 * MIB), "50000", "100000"]
    update(memory={"limit": 384 * MIB})
    assert seen(one_stack, container) == (2, memory + 256)
    update(memory={"limit": 256 * MIB}, unified={"memory.high": str(200 * MIB)})
    assert seen(one_stack, container) == (2, memory + 128)
    assert limits_there() == [str(256 * MIB), "50000", "100000"]
    high = containerd.ctr(
        "tasks", "exec", "--exec-id", new_id(), container, "cat", "/sys/fs/cgroup/memory.high"
    )
    assert high.stdout == f"{200 * MIB}\n"
    with pytest.raises(
        grpc.RpcError, match=r"update: memory\.low\.not: the guest's control groups have no such"
    ):
        update(unified={"memory.low.not": "1"})

"""The use of containers and pods, as the runtime interface reports it, compared with a known load."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.waiting import WITHIN_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cri.conftest import Duo
    from tests.cri.pods import Container

MIB = 1 << 20
HELD = 48 * MIB


@pytest.fixture(scope="package")
def load(duo: Duo) -> Iterator[Container]:
    """A container that keeps a processor busy and holds memory."""
    script = f"head -c {HELD} /dev/zero >/dev/shm/held; echo holding; while :; do :; done"
    container = duo.pod.run("load", "sh", "-c", script)
    container.wait_for_line("holding")
    yield container
    duo.worker.exec("rm", "-f", "/dev/shm/held")
    container.remove()


def test_the_use_of_a_container_is_that_of_its_load(duo: Duo, load: Container) -> None:
    def stats() -> Any:
        return duo.pod.stack.cri.call("ContainerStats", container_id=load.id).stats

    def used_s() -> float:
        return float(second.cpu.usage_core_nano_seconds.value - first.cpu.usage_core_nano_seconds.value) / 1e9

    began_s = time.monotonic()
    first = second = stats()
    while used_s() < 1:
        assert time.monotonic() - began_s < WITHIN_S
        time.sleep(0.1)
        second = stats()
    assert second.attributes.metadata.name == "load"
    assert second.cpu.timestamp > first.cpu.timestamp
    # It keeps one processor busy, and no more.
    assert used_s() < 1.2 * (time.monotonic() - began_s)
    assert HELD < second.memory.working_set_bytes.value < HELD + 64 * MIB


@pytest.mark.mainly
def test_the_use_of_all_containers_is_listed(duo: Duo, load: Container) -> None:
    stats = duo.pod.stack.cri.call("ListContainerStats", filter={"pod_sandbox_id": duo.pod.id}).stats
    use = {entry.attributes.metadata.name: entry for entry in stats}
    assert {"server", "worker", "load"} <= set(use)
    assert 0 < use["worker"].memory.working_set_bytes.value < 32 * MIB
    assert use["load"].memory.working_set_bytes.value > HELD
    assert use["worker"].memory.available_bytes.value == 0  # reported for memory without a limit
    assert all(entry.cpu.usage_core_nano_seconds.value > 0 for entry in stats)


def test_the_use_of_a_pod_covers_its_containers_and_its_network(duo: Duo, load: Container) -> None:
    def stats() -> Any:
        return duo.pod.stack.cri.call("PodSandboxStats", pod_sandbox_id=duo.pod.id).stats.linux

    # The first packets are the kernels' own, some time after the pods have started.
    until(lambda: stats().network.default_interface.rx_bytes.value > 0)
    linux = stats()
    names = {entry.attributes.metadata.name for entry in linux.containers}
    assert {"server", "worker", "load"} <= names
    assert linux.memory.usage_bytes.value > HELD
    assert linux.cpu.usage_core_nano_seconds.value > 0
    assert linux.network.default_interface.name == "eth0"
    assert linux.network.default_interface.tx_bytes.value > 0
    assert linux.network.default_interface.rx_bytes.value > 0

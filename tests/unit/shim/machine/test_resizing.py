"""The order in which a machine and its guest learn of a new size, and the effect of a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from hypervisor import ResizeError, ResizeRefusedError
from shim.config import HypervisorConfig
from shim.errors import ResourceExhausted
from shim.machine.limits import Limits
from shim.machine.resizing import Resizer
from shim.machine.sizing import plan

if TYPE_CHECKING:
    from hypervisor import Hypervisor, errors
    from shim.agent.client import Agent


MIB = 1 << 20
CONFIG = HypervisorConfig(vcpus=1, memory_mib=256, max_vcpus=8, max_memory_mib=4096)
SOME = Limits(quota_us=300_000, memory_bytes=256 * MIB)


class Machine:
    """A hypervisor and an agent that record what they are asked, and refuse on demand."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refusal: Exception | None = None
        self.fewest_vcpus = 1
        self.is_hako = True
        self.memory_limits: list[int] = []

    def limit_memory(self, size: int) -> None:
        self.memory_limits.append(size // MIB)

    @property
    def hypervisor(self) -> Hypervisor:
        return cast("Hypervisor", self)

    @property
    def agent(self) -> Agent:
        return cast("Agent", self)

    async def resize_vcpus(self, count: int) -> int:
        self.asked.append(f"vcpus {count}")
        if self.refusal is not None:
            raise self.refusal
        return max(count, self.fewest_vcpus)

    async def resize_memory(self, size: int) -> int:
        self.asked.append(f"memory {size // MIB}")
        if self.refusal is not None:
            raise self.refusal
        return size

    async def pin_vcpus(self, cpus: frozenset[int]) -> None:
        self.asked.append(f"pin {sorted(cpus)}")
        if self.refusal is not None:
            raise self.refusal

    async def use_cpus(self, count: int) -> None:
        self.asked.append(f"use {count}")

    async def follow_limits(self) -> None:
        self.asked.append("follow limits")

    async def online_memory(self) -> None:
        self.asked.append("online memory")

    def take(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def resizer(machine: Machine) -> Resizer:
    sizes = plan(CONFIG)
    return Resizer(machine.hypervisor, sizes, size=sizes.boot, limit_memory=machine.limit_memory)


async def test_the_guest_is_told_before_and_after_memory_and_after_processors(
    machine: Machine, resizer: Resizer
) -> None:
    await resizer.grow(machine.agent, [SOME])
    assert machine.take() == ["vcpus 4", "use 4", "online memory", "memory 512", "online memory"]


async def test_a_machine_that_is_large_enough_is_left_alone(machine: Machine, resizer: Resizer) -> None:
    await resizer.grow(machine.agent, [])
    await resizer.shrink(machine.agent, [SOME])
    await resizer.shrink(machine.agent, [])
    assert machine.take() == []


async def test_growing_never_shrinks_and_shrinking_never_grows(machine: Machine, resizer: Resizer) -> None:
    await resizer.grow(machine.agent, [SOME])
    machine.take()
    await resizer.grow(machine.agent, [])
    await resizer.shrink(machine.agent, [SOME, SOME])
    assert machine.take() == []
    await resizer.shrink(machine.agent, [])
    assert machine.take() == ["vcpus 1", "memory 256", "follow limits"]


async def test_the_hosts_limit_rises_before_growth_and_falls_after_shrinking(
    machine: Machine, resizer: Resizer
) -> None:
    await resizer.grow(machine.agent, [SOME])
    await resizer.shrink(machine.agent, [])
    assert machine.memory_limits == [512, 512, 512, 256]


async def test_the_hosts_limit_covers_memory_that_the_guest_kept(machine: Machine, resizer: Resizer) -> None:
    machine.refusal = ResizeRefusedError("no", reached=320 * MIB)
    with pytest.raises(ResourceExhausted):
        await resizer.grow(machine.agent, [Limits(memory_bytes=256 * MIB)])
    assert machine.memory_limits == [512, 320]


async def test_huge_pages_that_do_not_fit_are_refused_before_the_machine_grows(
    machine: Machine, resizer: Resizer
) -> None:
    with pytest.raises(ResourceExhausted, match=r"hugepageLimits: 3841 MiB of .* room for 3840 MiB"):
        await resizer.grow(machine.agent, [SOME, Limits(huge_bytes=3841 * MIB)])
    assert machine.take() == []
    await resizer.grow(machine.agent, [Limits(huge_bytes=3840 * MIB)])
    assert "memory 4096" in machine.take()


async def test_a_stock_agent_is_not_told_of_removed_memory(machine: Machine, resizer: Resizer) -> None:
    machine.is_hako = False
    await resizer.grow(machine.agent, [SOME])
    machine.take()
    await resizer.shrink(machine.agent, [])
    assert machine.take() == ["vcpus 1", "memory 256"]


async def test_processors_that_cannot_be_unplugged_are_taken_offline(
    machine: Machine, resizer: Resizer
) -> None:
    machine.fewest_vcpus = 4
    await resizer.grow(machine.agent, [SOME])
    machine.take()
    await resizer.shrink(machine.agent, [])
    assert machine.take() == ["vcpus 1", "use 1", "memory 256", "follow limits"]
    await resizer.grow(machine.agent, [Limits(quota_us=100_000)])
    assert machine.take() == ["vcpus 2", "use 2"]


@pytest.mark.parametrize("refusal", [ResizeError("no"), ResizeRefusedError("no", reached=1)])
async def test_a_machine_that_cannot_grow_is_an_error(
    machine: Machine, resizer: Resizer, refusal: errors.ResizeError | errors.ResizeRefusedError
) -> None:
    machine.refusal = refusal
    with pytest.raises(ResourceExhausted, match=r"^no$"):
        await resizer.grow(machine.agent, [SOME])


async def test_memory_that_the_guest_keeps_is_logged_and_requested_again(
    machine: Machine, resizer: Resizer, caplog: pytest.LogCaptureFixture
) -> None:
    more = Limits(memory_bytes=1024 * MIB)
    await resizer.grow(machine.agent, [more])
    machine.refusal = ResizeRefusedError("the guest stopped at 512 MiB", reached=512 * MIB)
    await resizer.shrink(machine.agent, [])
    assert "the guest stopped at 512 MiB" in caplog.text
    machine.take()
    machine.refusal = None
    await resizer.shrink(machine.agent, [])
    assert machine.take() == ["memory 256", "follow limits"]


async def test_a_machine_is_pinned_to_its_containers_processors_and_unpinned(
    machine: Machine, resizer: Resizer
) -> None:
    await resizer.grow(machine.agent, [Limits(cpuset=frozenset({2})), Limits(cpuset=frozenset({3}))])
    assert machine.take() == ["pin [2, 3]"]
    await resizer.grow(machine.agent, [Limits(cpuset=frozenset({2, 3}))])
    assert machine.take() == []
    await resizer.shrink(machine.agent, [Limits(cpuset=frozenset({2})), Limits()])
    assert machine.take() == ["pin []"]


async def test_pinning_to_a_missing_processor_does_not_stop_a_container(
    machine: Machine, resizer: Resizer
) -> None:
    machine.refusal = ResizeError("pin vcpus: to [99]: Invalid argument")
    await resizer.grow(machine.agent, [Limits(cpuset=frozenset({99}))])
    assert machine.take() == ["pin [99]"]


async def test_a_clone_grows_to_its_pods_needs_and_never_shrinks_below_them(machine: Machine) -> None:
    sizes = plan(CONFIG, pod=Limits(quota_us=100_000, memory_bytes=256 * MIB))
    resizer = Resizer(machine.hypervisor, sizes, size=sizes.base, limit_memory=machine.limit_memory)

    await resizer.grow(machine.agent, [])
    assert machine.take() == ["vcpus 2", "use 2", "online memory", "memory 512", "online memory"]
    await resizer.grow(machine.agent, [])
    await resizer.shrink(machine.agent, [])
    assert machine.take() == []

"""A machine's size depends only on the configuration and the live containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shim.config import HypervisorConfig
from shim.machine.limits import Limits, annotated_limits, limits_of
from shim.machine.pod import from_oci
from shim.machine.sizing import Plan, Size, plan

if TYPE_CHECKING:
    from typing import Any


MIB = 1 << 20
CONFIG = HypervisorConfig(vcpus=1, memory_mib=256, max_vcpus=8, max_memory_mib=4096)
STATIC = HypervisorConfig(vcpus=1, memory_mib=256, max_vcpus=8, max_memory_mib=4096, static_sizing=True)
PAUSE = {"io.kubernetes.cri.container-type": "sandbox"}


def size(vcpus: int, memory_mib: int) -> Size:
    return Size(vcpus=vcpus, memory_bytes=memory_mib * MIB)


def spec(
    *, quota: object = None, period: object = None, memory: object = None, **annotations: str
) -> dict[str, Any]:
    cpu = {key: value for key, value in {"quota": quota, "period": period}.items() if value is not None}
    limit = {} if memory is None else {"limit": memory}
    return {"linux": {"resources": {"cpu": cpu, "memory": limit}}, "annotations": annotations}


def pod(**sizes: int) -> dict[str, Any]:
    names = {f"io.kubernetes.cri.sandbox-{key.replace('_', '-')}": str(value) for key, value in sizes.items()}
    return {"annotations": {**PAUSE, **names}}


def plan_for(config: HypervisorConfig, oci: dict[str, Any]) -> Plan:
    made = from_oci(oci)
    return plan(config, pod=made.limits, first=made.first)


def test_a_machine_without_containers_has_the_configured_size() -> None:
    assert plan(CONFIG).wanted([]) == size(1, 256)


def test_limits_are_added_before_fractions_are_rounded_up() -> None:
    half = Limits(quota_us=50_000, memory_bytes=100 * MIB)
    assert plan(CONFIG).wanted([half]) == size(2, 356)
    assert plan(CONFIG).wanted([half, half]) == size(2, 456)
    assert plan(CONFIG).wanted([half, half, half]) == size(3, 556)


def test_memory_is_rounded_up_to_a_mebibyte() -> None:
    assert plan(CONFIG).wanted([Limits(memory_bytes=1), Limits(memory_bytes=1)]) == size(1, 257)


def test_huge_pages_count_as_memory_and_survive_an_update_without_them() -> None:
    limits = [{"pageSize": "2MB", "limit": 64 * MIB}, {"pageSize": "1GB", "limit": 1024 * MIB}]
    first = Limits(memory_bytes=100 * MIB).updated({"hugepageLimits": limits})
    assert plan(CONFIG).wanted([first]) == size(1, 256 + 100 + 64 + 1024)
    assert first.updated({"memory": {"limit": MIB}}).huge_bytes == (64 + 1024) * MIB
    assert first.updated({"hugepageLimits": limits[:1]}).huge_bytes == 64 * MIB


@pytest.mark.parametrize("limits", [None, 7, [None], [{"limit": "x"}], [{"limit": -1}]])
def test_malformed_limits_on_huge_pages_add_nothing(
    limits: int | list[dict[str, int | str] | None] | None,
) -> None:
    assert Limits().updated({"hugepageLimits": limits}).huge_bytes == 0


def test_a_container_without_limits_adds_nothing() -> None:
    assert plan(CONFIG).wanted([Limits()]) == size(1, 256)


def test_a_machine_never_exceeds_its_maximum() -> None:
    assert plan(CONFIG).wanted([Limits(quota_us=10**9, memory_bytes=1 << 50)]) == size(8, 4096)


def test_a_maximum_below_the_start_is_raised_to_it() -> None:
    small = HypervisorConfig(vcpus=2, memory_mib=1024, max_vcpus=1, max_memory_mib=512)
    assert plan(small).most == size(2, 1024)


def test_without_a_maximum_the_hosts_size_is_the_limit() -> None:
    assert plan(HypervisorConfig()).most.memory_bytes > 512 * MIB


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            spec(quota=150_000, period=100_000, memory=64 * MIB),
            Limits(quota_us=150_000, memory_bytes=64 * MIB),
        ),
        (spec(quota=20_000, period=10_000), Limits(quota_us=20_000, period_us=10_000)),
        (spec(quota=100_000), Limits(quota_us=100_000)),
        (spec(quota=100_000, period=0), Limits(quota_us=100_000)),
        (spec(quota=-1, period=100_000, memory=-1), Limits()),
        (spec(memory=9223372036854771712), Limits()),
        (spec(quota="much", memory=1.5), Limits()),
        ({"linux": {"resources": None}}, Limits()),
        ({"linux": []}, Limits()),
        ({}, Limits()),
    ],
)
def test_limits_are_read_from_a_specification(given: dict[str, Any], expected: Limits) -> None:
    assert limits_of(given) == expected


def test_an_update_changes_only_what_it_mentions() -> None:
    before = Limits(quota_us=100_000, memory_bytes=64 * MIB)
    assert before.updated({"memory": {"limit": 128 * MIB}}) == Limits(
        quota_us=100_000, memory_bytes=128 * MIB
    )
    assert before.updated({"cpu": {"quota": -1}}) == Limits(memory_bytes=64 * MIB)
    assert before.updated({}) == before


def test_during_an_update_the_larger_of_each_limit_counts() -> None:
    before = Limits(quota_us=200_000, memory_bytes=64 * MIB)
    after = Limits(quota_us=15_000, period_us=10_000, memory_bytes=128 * MIB)
    assert before.or_more(after) == Limits(quota_us=200_000, memory_bytes=128 * MIB)


@pytest.mark.parametrize(
    ("annotations", "cpus", "memory"),
    [
        (pod(cpu_quota=150_000, cpu_period=100_000, memory=128 * MIB), 1.5, 128 * MIB),
        (pod(cpu_quota=50_000), 0.5, 0),
        (pod(cpu_quota=0, cpu_shares=2048), 2, 0),
        (pod(cpu_shares=2), 0, 0),
        ({"annotations": {"io.kubernetes.cri.sandbox-memory": "x" * 9}}, 0, 0),
        ({"annotations": {"io.kubernetes.cri.sandbox-memory": "9" * 5000}}, 0, 0),
        ({"annotations": {"io.kubernetes.cri.sandbox-cpu-quota": "-1"}}, 0, 0),
    ],
)
def test_a_pods_limits_are_read_from_its_annotations(
    annotations: dict[str, dict[str, str]], cpus: float, memory: int
) -> None:
    limits = annotated_limits(annotations)
    assert (float(limits.cpus), limits.memory_bytes) == (cpus, memory)


def test_a_pod_starts_with_room_for_its_future_containers() -> None:
    sizes = plan_for(CONFIG, pod(cpu_quota=200_000, cpu_period=100_000, memory=512 * MIB))
    assert sizes.boot == size(3, 768)
    whole = Limits(quota_us=200_000, memory_bytes=512 * MIB)
    assert sizes.wanted([whole]) == size(3, 768)
    assert sizes.wanted([whole, whole]) == size(5, 1280)
    assert sizes.wanted([]) == size(3, 768)


def test_the_machine_grows_for_a_single_container_when_it_is_created() -> None:
    sizes = plan_for(CONFIG, spec(quota=200_000, memory=512 * MIB))
    assert sizes.boot == size(1, 256)
    assert sizes.wanted([limits_of(spec(quota=200_000, memory=512 * MIB))]) == size(3, 768)


def test_static_sizing_keeps_the_initial_size() -> None:
    sizes = plan_for(STATIC, spec(quota=200_000, memory=512 * MIB))
    assert sizes.boot == sizes.most == size(3, 768)
    assert sizes.wanted([Limits(memory_bytes=1 << 40)]) == size(3, 768)


def test_static_sizing_ignores_a_pause_container() -> None:
    paused = {**spec(quota=200_000), "annotations": PAUSE}
    assert plan_for(STATIC, paused).boot == size(1, 256)


@pytest.mark.parametrize(
    ("text", "processors"),
    [("0-2,5", {0, 1, 2, 5}), ("3", {3}), ("", set()), ("2-1", set()), ("x", set()), (7, set())],
)
def test_lists_of_processors_are_read_in_the_kernels_format(text: object, processors: set[int]) -> None:
    assert limits_of({"linux": {"resources": {"cpu": {"cpus": text}}}}).cpuset == processors

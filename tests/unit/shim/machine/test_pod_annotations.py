"""Pods change their machines by annotations that the operator allows."""

from __future__ import annotations

import logging
import os
from fnmatch import fnmatchcase
from typing import Any

import pytest

from shim.config import SECTIONS, Config, GuestConfig, HypervisorConfig, ShimConfig
from shim.errors import InvalidArgument
from shim.machine.pod_annotations import ANNOTATIONS, FACTS, applied

KATA = "io.katacontainers.config."
ALL = ShimConfig(enable_annotations="*")
HYPERVISOR = HypervisorConfig(max_vcpus=4, max_memory_mib=4096, machine_options="usb=off")
OPEN = Config(hypervisor=HYPERVISOR, guest=GuestConfig(kernel_parameters="quiet"), shim=ALL)


def asked(annotations: dict[str, Any], config: Config = OPEN) -> Config:
    return applied(config, {"annotations": annotations}, phase="create")


def refusal(annotations: dict[str, Any], config: Config = OPEN) -> str:
    with pytest.raises(InvalidArgument) as caught:
        asked(annotations, config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "section", "key", "expected"),
    [
        ("io.hako.vcpus", "3", "hypervisor", "vcpus", 3),
        ("io.hako.memory_mib", "1024", "hypervisor", "memory_mib", 1024),
        ("io.hako.max_vcpus", "2", "hypervisor", "max_vcpus", 2),
        ("io.hako.max_memory_mib", "2048", "hypervisor", "max_memory_mib", 2048),
        ("io.hako.static_sizing", "true", "hypervisor", "static_sizing", True),
        ("io.hako.root_ports", "2", "hypervisor", "root_ports", 2),
        ("io.hako.huge_pages", "true", "hypervisor", "huge_pages", True),
        ("io.hako.template", "off", "hypervisor", "template", "off"),
        ("io.hako.machine_options", "hpet=off", "hypervisor", "machine_options", "usb=off,hpet=off"),
        ("io.hako.park_after_s", "600", "hypervisor", "park_after_s", 600),
        ("io.hako.boot_timeout_s", "90", "guest", "boot_timeout_s", 90),
        ("io.hako.kernel", "/k", "guest", "kernel", "/k"),
        ("io.hako.initrd", "/i", "guest", "initrd", "/i"),
        ("io.hako.kernel_parameters", "nosmt", "guest", "kernel_parameters", "quiet nosmt"),
        (f"{KATA}hypervisor.default_vcpus", "3", "hypervisor", "vcpus", 3),
        (f"{KATA}hypervisor.default_vcpus", "1.5", "hypervisor", "vcpus", 2),
        (f"{KATA}hypervisor.default_memory", "1024", "hypervisor", "memory_mib", 1024),
        (f"{KATA}hypervisor.default_max_vcpus", "2", "hypervisor", "max_vcpus", 2),
        (f"{KATA}hypervisor.pcie_root_port", "2", "hypervisor", "root_ports", 2),
        (f"{KATA}hypervisor.enable_hugepages", "true", "hypervisor", "huge_pages", True),
        (f"{KATA}hypervisor.machine_accelerators", "a=b", "hypervisor", "machine_options", "usb=off,a=b"),
        (f"{KATA}hypervisor.kernel", "/k", "guest", "kernel", "/k"),
        (f"{KATA}hypervisor.initrd", "/i", "guest", "initrd", "/i"),
        (f"{KATA}hypervisor.kernel_params", "nosmt", "guest", "kernel_parameters", "quiet nosmt"),
    ],
)
def test_an_annotation_sets_only_its_key(
    name: str, value: str, section: str, key: str, expected: object
) -> None:
    found = asked({name: value})

    assert getattr(getattr(found, section), key) == expected
    for each in SECTIONS:
        before, after = getattr(OPEN, each).as_dict(), getattr(found, each).as_dict()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == ({key} if each == section else set())


def test_the_test_above_covers_every_annotation() -> None:
    [parameters] = [
        mark.args[1]
        for mark in test_an_annotation_sets_only_its_key.pytestmark  # type: ignore[attr-defined]
    ]
    assert {name for name, *_ in parameters} == set(ANNOTATIONS)


def test_the_default_allows_exactly_the_annotations_without_risk() -> None:
    patterns = ShimConfig().enable_annotations.split()
    allowed = {name for name in ANNOTATIONS if any(fnmatchcase(name, pattern) for pattern in patterns)}

    assert allowed == {name for name, each in ANNOTATIONS.items() if not each.risk}
    assert not any(ANNOTATIONS[name].declaration.is_path for name in allowed)


@pytest.mark.parametrize("name", [name for name, each in ANNOTATIONS.items() if each.risk])
def test_an_annotation_that_is_not_allowed_is_refused_by_name(name: str) -> None:
    line = refusal({name: "x"}, Config())

    assert line.startswith(f"create: annotation {name}: not allowed on this host; ")
    assert "[shim] enable_annotations" in line


def test_a_pattern_is_anchored_at_both_ends() -> None:
    config = Config(shim=ShimConfig(enable_annotations="kernel io.hako.kern vcpus"))

    for name in ("io.hako.kernel", "io.hako.vcpus", "io.hako.kernel_parameters"):
        assert "not allowed" in refusal({name: "1"}, config)


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ({"io.hako.vcpus": "0"}, "io.hako.vcpus: 0 is too small; give at least 1"),
        ({"io.hako.vcpus": "5"}, "a machine may have 4 at most"),
        ({"io.hako.vcpus": "1.5"}, "'1.5' is not a whole number"),
        ({"io.hako.vcpus": " 1"}, "' 1' is not a whole number"),
        ({"io.hako.vcpus": "-1"}, "'-1' is not a whole number"),
        ({"io.hako.vcpus": "٣"}, "is not a whole number"),
        ({"io.hako.vcpus": "9" * 5000}, "is not a whole number"),
        ({f"{KATA}hypervisor.default_vcpus": "1."}, "'1.' is not a number"),
        ({f"{KATA}hypervisor.default_vcpus": "nan"}, "'nan' is not a number"),
        ({"io.hako.memory_mib": "64"}, "64 is too small; give at least 128"),
        ({"io.hako.memory_mib": "4097"}, "a machine may have 4096 at most"),
        ({"io.hako.max_memory_mib": "8192"}, "raise [hypervisor] max_memory_mib"),
        ({"io.hako.max_vcpus": "0"}, "[hypervisor] max_vcpus allows less"),
        ({"io.hako.root_ports": "17"}, "give at most 16"),
        ({"io.hako.static_sizing": "yes"}, "'yes' is not a truth value"),
        ({"io.hako.template": "auto"}, "'auto' is not offered; give off"),
        ({"io.hako.kernel": "vmlinux"}, "not an absolute path"),
        ({"io.hako.kernel_parameters": "a\0b"}, "NUL"),
        ({"io.hako.vcpu": "1"}, "no such setting (did you mean io.hako.vcpus?)"),
        ({f"{KATA}hypervisor.block_device_aio": "native"}, "no such setting"),
        ({f"{KATA}hypervisor.block_device_driver": "nvdimm"}, "'nvdimm' cannot be had; only virtio-blk"),
        ({f"{KATA}agent.policy": "cGFja2FnZQ=="}, "no such setting"),
        ({f"{KATA}runtime.disable_guest_seccomp": "true"}, "'true' cannot be had; only false"),
        ({"io.hako.vcpus": "1", f"{KATA}hypervisor.default_vcpus": "2"}, "io.hako.vcpus says otherwise"),
    ],
)
def test_an_impossible_value_is_refused(annotations: dict[str, str], words: str) -> None:
    line = refusal(annotations)

    assert words in line
    assert "\n" not in line
    assert any(f"annotation {name}: " in line for name in annotations)


def test_without_an_operators_limit_the_hosts_size_is_the_limit() -> None:
    processors = os.cpu_count() or 1

    assert asked({"io.hako.vcpus": str(processors)}, Config()).hypervisor.vcpus == processors
    assert f"may have {processors} at most" in refusal({"io.hako.vcpus": str(processors + 1)}, Config())


@pytest.mark.parametrize("fact", FACTS.values(), ids=FACTS)
def test_a_request_for_what_hako_always_does_is_accepted(fact: Any) -> None:
    for value in fact.values:
        assert asked({fact.name: value}, Config()) == Config()


@pytest.mark.parametrize(
    "annotations",
    [
        None,
        "no mapping",
        {},
        {"io.kubernetes.cri.sandbox-id": "x"},
        {"io.hako.vcpus": 2},
        {"io.hako.at-least/vm.max_map_count": "262144"},
        {"io.hako.unified/memory.high": "max"},
    ],
)
def test_other_annotations_change_nothing(annotations: Any) -> None:
    assert applied(OPEN, {"annotations": annotations}, phase="create") is OPEN


def test_an_annotation_for_kata_alone_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    name = "io.katacontainers.container.resource.swappiness"
    assert asked({name: "60"}) is OPEN
    assert name in caplog.text

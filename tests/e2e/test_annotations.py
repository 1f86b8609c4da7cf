"""Annotations change the machine as they say; what the operator does not allow is refused by name."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto.hako import management_pb2 as api
from shim.config import GuestConfig
from shim.machine.pod_annotations import ANNOTATIONS
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import _census, new_id, write_config
from tests.e2e.test_management import ask
from tests.e2e.test_parking import PARK_ANNOTATION
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

KATA = "io.katacontainers.config.hypervisor."
OPERATOR = """\
vcpus = 2
root_ports = 1
static_sizing = true
template_dir = "{templates}"
"""
#: Two pods that ask for the same machine: by Hako's own names, and by Kata's.
OWN = {
    "io.hako.vcpus": "1",
    "io.hako.max_vcpus": "1",
    "io.hako.memory_mib": "640",
    "io.hako.max_memory_mib": "1024",
    "io.hako.static_sizing": "false",
    "io.hako.root_ports": "3",
    "io.hako.machine_options": "hpet=off",
    "io.hako.template": "off",
    "io.hako.kernel_parameters": "hako.pod=1",
}
OF_KATA = {
    f"{KATA}default_vcpus": "0.6",
    f"{KATA}default_max_vcpus": "1",
    f"{KATA}default_memory": "640",
    f"{KATA}pcie_root_port": "3",
    f"{KATA}machine_accelerators": "hpet=off",
    f"{KATA}kernel_params": "hako.pod=1",
    f"{KATA}machine_type": "q35",
    f"{KATA}shared_fs": "virtio-fs",
    f"{KATA}reclaim_guest_freed_memory": "true",
    f"{KATA}enable_mem_prealloc": "false",
    f"{KATA}enable_iommu": "false",
}
FILES = {
    "io.hako.kernel": "kernel",
    "io.hako.initrd": "initrd",
    f"{KATA}kernel": "kernel",
    f"{KATA}initrd": "initrd",
}
ASKED = {
    kind: {**asked, **{name: f"{{home}}/{file}" for name, file in FILES.items() if name.startswith(prefix)}}
    for kind, asked, prefix in (("own", OWN, "io.hako."), ("kata", OF_KATA, KATA))
}


def given(annotations: dict[str, str]) -> list[str | Path]:
    """Give a container annotations, and remove it when it has ended."""
    return ["--rm", *(f"--annotation={name}={value}" for name, value in annotations.items())]


@pytest.fixture(scope="module")
def config(one_stack: Stack, home: Path, templates: Path) -> Path:
    """A configuration whose operator allows everything."""
    return write_config(
        home / "annotations.toml",
        state_directory=one_stack.state_directory,
        protocol=one_stack.protocol,
        hypervisor=f'template = "auto"\n{OPERATOR.format(templates=templates)}',
        shim='enable_annotations = "io.hako.* io.katacontainers.config.hypervisor.*"',
        guest=f'boot_timeout_s = {patient(60):.0f}\nkernel_parameters = "hako.operator=1"',
    )


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest, one_stack: Stack, home: Path, config: Path) -> Iterator[Seen]:
    """A machine that a pod has changed by annotations."""
    for file in {*FILES.values()}:
        shutil.copy(getattr(GuestConfig(), file), home / file)
    asked = {name: value.format(home=home) for name, value in ASKED[request.param].items()}
    containerd, container = one_stack.containerd, new_id()
    options = [*given(asked)[1:], "--detach", "--runtime-config-path", config]
    with _census(one_stack):
        started = containerd.run(IMAGE, container, "sleep", "100000", options=options)
        try:
            assert started.code == 0, started.stderr
            found = ask(one_stack.record(container), "Describe", api.DescribeRequest(), api.DescribeResponse)
            [qemu] = [each.pid for each in found.processes if each.name == "QEMU"]
            shown = containerd.exec(container, "look", "cat", "/proc/cmdline").stdout
            argv = Path(f"/proc/{qemu}/cmdline").read_text(encoding="utf-8").split("\0")
            yield Seen(asked, found.machine, argv, shown.split())
        finally:
            containerd.remove(container)


@dataclass(frozen=True, slots=True)
class Seen:
    """A machine as it can be seen.

    :param asked: the annotations of its pod.
    :param machine: what its shim tells.
    :param argv: QEMU's.
    :param parameters: the guest kernel's.
    """

    asked: dict[str, str]
    machine: api.Machine
    argv: list[str]
    parameters: list[str]

    def after(self, option: str) -> str:
        """What follows an option of QEMU's."""
        return self.argv[self.argv.index(option) + 1]


#: What shows that a machine is as an annotation says, by the key that it sets or by Kata's name.
SHOWS: dict[str, Callable[[Seen], bool]] = {
    "vcpus": lambda seen: seen.machine.vcpus == 1,
    "max_vcpus": lambda seen: seen.machine.max_vcpus == 1,
    "memory_mib": lambda seen: seen.machine.memory_bytes == 640 << 20,
    "max_memory_mib": lambda seen: seen.machine.max_memory_bytes == 1024 << 20,
    "static_sizing": lambda seen: seen.machine.max_memory_bytes > seen.machine.memory_bytes,
    "root_ports": lambda seen: len(set(re.findall(r"id=port\d+", " ".join(seen.argv)))) == 3,
    "machine_options": lambda seen: "hpet=off" in seen.after("-machine").split(","),
    "template": lambda seen: seen.machine.template_key == "",
    "kernel_parameters": lambda seen: {"hako.operator=1", "hako.pod=1"} <= {*seen.parameters},
    "kernel": lambda seen: seen.after("-kernel") in seen.asked.values(),
    "initrd": lambda seen: seen.after("-initrd") in seen.asked.values(),
    "machine_type": lambda seen: seen.after("-machine").startswith("q35"),
    "shared_fs": lambda seen: any("vhost-user-fs" in word for word in seen.argv),
    "reclaim_guest_freed_memory": lambda seen: "free-page-reporting=on" in " ".join(seen.argv),
    "enable_mem_prealloc": lambda seen: "prealloc=on" not in " ".join(seen.argv),
    "enable_iommu": lambda seen: "iommu" not in " ".join(seen.argv),
}


@pytest.mark.parametrize(
    ("machine", "name"),
    [(kind, name) for kind, asked in ASKED.items() for name in asked],
    indirect=["machine"],
    scope="module",
)
def test_an_annotation_changes_the_machine(machine: Seen, name: str) -> None:
    key = ANNOTATIONS[name].key if name in ANNOTATIONS else name.removeprefix(KATA)
    assert SHOWS[key](machine)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("io.hako.boot_timeout_s", "1", "guest agent did not answer within 1 s"),
        ("io.hako.huge_pages", "true", "guest RAM"),
        (f"{KATA}enable_hugepages", "true", "guest RAM"),
    ],
)
def test_an_annotation_that_this_host_cannot_fulfil_fails_create_with_the_reason(
    one_stack: Stack, config: Path, name: str, value: str, reason: str
) -> None:
    options = [*given({name: value, "io.hako.template": "off"}), "--runtime-config-path", config]
    result = one_stack.containerd.run(IMAGE, new_id(), "true", options=options)

    assert result.code == 1
    assert reason in result.stderr


def test_every_annotation_has_a_test_here_or_among_those_of_parking() -> None:
    fail = {"io.hako.boot_timeout_s", "io.hako.huge_pages", f"{KATA}enable_hugepages"}
    assert {*ASKED["own"], *ASKED["kata"], *fail, PARK_ANNOTATION} >= {*ANNOTATIONS}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (f"{KATA}kernel", "/etc/shadow", "not allowed on this host"),
        ("io.hako.vcpus", "0", "too small"),
        (f"{KATA}confidential_guest", "true", "no such setting"),
    ],
)
def test_a_refused_annotation_fails_create_with_its_name(
    one_stack: Stack, name: str, value: str, reason: str
) -> None:
    result = one_stack.containerd.run(IMAGE, new_id(), "true", options=given({name: value}))

    assert result.code == 1
    [line] = result.stderr.strip().splitlines()
    assert f"annotation {name}: " in line
    assert reason in line

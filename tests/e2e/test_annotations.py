"""Annotations change the machine as they say; what the operator does not allow is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id, write_config

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

KATA = "io.katacontainers.config.hypervisor."
SCRIPT = """\
nproc
grep MemTotal /proc/meminfo
cat /proc/cmdline
ls /sys/bus/pci/devices | wc -l
"""


def given(annotations: dict[str, str]) -> list[str | Path]:
    options: list[str | Path] = ["--rm"]
    for name, value in annotations.items():
        options += ["--annotation", f"{name}={value}"]
    return options


def test_a_machine_is_as_its_annotations_say(one_stack: Stack, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    write_config(
        config,
        state_directory=one_stack.state_directory,
        protocol=one_stack.protocol,
        shim='enable_annotations = "io.hako.* io.katacontainers.config.hypervisor.*"',
        guest='boot_timeout_s = 300\nkernel_parameters = "hako.operator=1"',
    )

    def seen(annotations: dict[str, str]) -> tuple[str, int, str, int]:
        options = [*given(annotations), "--runtime-config-path", config]
        result = one_stack.containerd.run(IMAGE, new_id(), "sh", "-c", SCRIPT, options=options)
        assert result.code == 0, result.stderr
        processors, memory, command_line, devices = result.stdout.splitlines()
        return processors, round(int(memory.split()[1]) / 1024), command_line, int(devices)

    _, memory_mib, _, devices = seen({})
    processors, more_mib, command_line, more_devices = seen(
        {
            f"{KATA}default_vcpus": "1.2",
            f"{KATA}default_memory": "640",
            f"{KATA}kernel_params": "hako.pod=1",
            f"{KATA}machine_type": "q35",
            "io.hako.root_ports": "2",
            "io.hako.static_sizing": "true",
            "io.hako.template": "off",
            "io.hako.boot_timeout_s": "300",
        }
    )

    assert processors == "2"
    assert 100 < more_mib - memory_mib < 156
    assert "hako.operator=1 hako.pod=1" in command_line
    assert more_devices >= devices + 2


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

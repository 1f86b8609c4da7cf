"""A timeline shows how a start spends its time, from ``start`` to the first byte of output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from shim import cli
from shim.telemetry.timeline_model import parse
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import write_config
from tests.e2e.containerd import NAMESPACE
from tests.e2e.life import until

if TYPE_CHECKING:
    from pathlib import Path

    from shim.telemetry.timeline_model import Timeline
    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

COLD = ("spawn virtio-fs daemon", "open agent's channel", "spawn QEMU", "QMP", "guest boots", "CreateSandbox")
ORDER = {
    "containerd": ("start", "Create", "Start"),
    "start": ("interpreter", "input, configuration, bundle", "lock", "state", "daemon", "reply"),
    "shim": ("process", "imports", "configuration, mount namespace"),
    "machine": ("share, host's abilities", "network namespace", *COLD),
    "kernel": ("boot", "unpack the initramfs"),
    "agent": (
        "interpreter",
        "mounts",
        "modules",
        "services",
        "CreateSandbox",
        "CreateContainer",
        "StartContainer",
    ),
    "container": (
        "wait for the machine",
        "streams",
        "CreateContainer",
        "StartContainer",
        "first byte of stdout",
    ),
}


def phases_of(timeline: Timeline, lane: str) -> list[str]:
    return [phase.name for phase in timeline.phases if phase.lane.partition(" ")[0] == lane]


@pytest.mark.mostly_on("1.6-ttrpc")
def test_a_container_that_asks_for_it_leaves_the_timeline_of_its_start_as_a_picture_and_a_trace(
    stack: Stack, container: str, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "cold.toml",
        state_directory=stack.state_directory,
        protocol=stack.protocol,
        hypervisor='template = "off"',
    )
    options: list[str | Path] = ["--rm", "--env", "HAKO_TIMELINE=1", "--runtime-config-path", config]
    result = stack.containerd.run(IMAGE, container, "echo", "hello", options=options)
    assert result.stdout == "hello\n", result.stderr

    files = stack.state_directory.parent / "log" / f"{NAMESPACE}__{container}"
    timeline = parse(files.with_suffix(".timeline").read_text(), title=container)
    for lane, names in ORDER.items():
        assert [name for name in phases_of(timeline, lane) if name in names] == list(names), lane
    first, last = timeline.phases[0], max(timeline.phases, key=lambda phase: phase.ended_s)
    assert (first.lane, first.name) == ("containerd", "start")
    assert (last.lane, last.name) == (f"container {container}", "first byte of stdout")
    assert _unexplained_s(timeline) < 0.35 * timeline.length_s
    assert files.with_suffix(".svg").read_text().startswith("<svg ")
    events = json.loads(files.with_suffix(".json").read_text())["traceEvents"]
    assert len([event for event in events if event["ph"] != "M"]) == len(timeline.phases)


@pytest.mark.mostly_on("1.6-ttrpc")
def test_the_timeline_of_a_sandbox_that_runs_is_shown_and_goes_on_with_each_container(
    stack: Stack, container: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = stack.containerd.run(IMAGE, container, "sh", "-c", "echo up; sleep 1000", options=["--detach"])
    assert started.code == 0, started.stderr

    command = ["timeline", container, "--config", str(stack.config)]

    def shown() -> str:
        status, told = cli.main(command), capsys.readouterr()
        return told.out if status == 0 else ""

    until(lambda: "first byte of stdout" in shown(), what="the timeline of a container that has spoken")
    until(lambda: "CreateSandbox" in shown(), what="the guest's part")
    assert cli.main([*command, "--svg", f"{tmp_path}/a.svg"]) == 0
    assert (tmp_path / "a.svg").read_text().startswith("<svg ")
    assert not list((stack.state_directory.parent / "log").glob(f"*__{container}.svg"))
    stack.containerd.remove(container)


def _unexplained_s(timeline: Timeline) -> float:
    """Add up the time in which every party only waited."""
    ended_s = unexplained_s = 0.0
    for phase in timeline.phases:
        if phase.lane == "containerd" or phase.name in {"wait for the machine", "guest boots"}:
            continue
        unexplained_s += max(0.0, phase.began_s - ended_s)
        ended_s = max(ended_s, phase.ended_s)
    return unexplained_s

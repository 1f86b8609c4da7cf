"""Floods from a guest cost the host little, and a machine that does not stop one is ended."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import flooding
from tests.e2e.containerd import SHIM_DIRECTORY
from tests.e2e.life import MOMENT_S, Life

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.timeout(240)]

STATE_S = 0.5
ENDED_WITHIN_S = MOMENT_S
HELD_BACK_S = 6.0
CONSOLE_BYTES = 1 << 20
MOST_GROWTH_KIB = 32 << 10
# QEMU's docs/specs/acpi_mem_hotplug.rst and acpi_cpu_hotplug.rst: the selector, the command, the status.
MODULE, MODULE_STATUS = (0xA00, 0), 0xA08
PROCESSOR, PROCESSOR_COMMAND, PROCESSOR_STATUS = (0xCD8, 0), (0xCDD, 2), 0xCE0
PANIC_DEVICE = "$(dirname $(grep -l 0x0011 /sys/bus/pci/devices/*/device))/resource0"
CRASH_LOADED = 2  # QEMU's docs/specs/pvpanic.rst
CLOCK_SECONDS = (0x70, 0)
CLOCK_DATA = 0x71
ENDLESS = {
    "memory modules": (flooding.as_command(flooding.to_port(MODULE_STATUS, MODULE)), "ACPI_DEVICE_OST"),
    "processors": (
        flooding.as_command(flooding.to_port(PROCESSOR_STATUS, PROCESSOR, PROCESSOR_COMMAND)),
        "ACPI_DEVICE_OST",
    ),
    "panic device": (
        f"mount -t sysfs sysfs /sys; {flooding.as_command(flooding.to_memory(CRASH_LOADED), PANIC_DEVICE)}",
        "GUEST_CRASHLOADED",
    ),
}
BY_DAY = "processors"
HELD_BACK = {
    "console": "mkdir /guest; mount -t devtmpfs dev /guest; yes flood-of-lines >/guest/hvc0 &",
    "kernel log": "while echo '<0>flood-of-messages' >/guest/kmsg; do :; done &",
    "clock": flooding.as_command(flooding.to_port(CLOCK_DATA, CLOCK_SECONDS)),
}
SHOWN = {b"flood-of-lines", b"flood-of-messages"}


@pytest.fixture
def life(one_stack: Stack, home: Path) -> Iterator[Life]:
    """A container that runs beside a privileged one in the same machine."""
    with Life(one_stack, home) as begun:
        begun.open_door()
        begun.write_down()
        begun.tasks.begin_create(begun.id).result()
        begun.tasks.call("Start", begun.id)
        yield begun


def resident_kib(pid: int) -> int:
    """Return how much of a process is in memory; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


def ask_for_state(life: Life, took_s: list[float], *, for_s: float) -> str:
    """Ask for the state of a task again and again, until it has ended.

    :param took_s: to which the time that each answer took is added, in seconds.
    :param for_s: for how long.
    :returns: the last state.
    """
    ends_at = time.monotonic() + for_s
    state = ""
    while state != "STOPPED" and time.monotonic() < ends_at:
        asked_at = time.monotonic()
        state, _ = life.tasks.state(life.id)
        took_s.append(time.monotonic() - asked_at)
    return state


def assert_in_time(took_s: list[float]) -> None:
    """Make sure that State was answered in time throughout."""
    assert [each for each in took_s if each >= STATE_S] == []


@pytest.mark.alone
@pytest.mark.parametrize(
    "source", [pytest.param(each, marks=() if each == BY_DAY else pytest.mark.nightly) for each in ENDLESS]
)
def test_a_machine_that_floods_qemus_monitor_is_ended(life: Life, one_stack: Stack, source: str) -> None:
    command, event = ENDLESS[source]
    qemu, shim = life.pid("QEMU"), life.pid("shim")
    before = {pid: resident_kib(pid) for pid in (qemu, shim)}

    life.do_as_root(command)

    most, took_s = 0, list[float]()
    ends_at = time.monotonic() + ENDED_WITHIN_S
    while ask_for_state(life, took_s, for_s=0.1) != "STOPPED" and time.monotonic() < ends_at:
        most = max(most, *(resident_kib(pid) - size for pid, size in before.items()))
    assert_in_time(took_s)
    assert life.tasks.state(life.id) == ("STOPPED", 137)
    assert most < MOST_GROWTH_KIB
    sandbox_id = life.all_ids[0]
    life.remove()
    reason = f"sandbox {sandbox_id}: killed, because its guest flooded the host with {event} events"
    life.wait_for_log(f"level=error .*{reason}")
    life.wait_for_log(f"wait: container {life.id}: {reason}; its status is 137")
    kept = subprocess.run(
        [SHIM_DIRECTORY / "hako", "logs", sandbox_id, "--config", one_stack.config],
        capture_output=True,
        text=True,
        timeout=MOMENT_S,
        check=True,
    )
    assert reason.partition(": ")[2] in kept.stdout


@pytest.mark.alone
def test_bounded_floods_do_not_disturb_others(life: Life, one_stack: Stack) -> None:
    console = Path(one_stack.record(life.all_ids[0]).state_directory) / "console.log"
    before = {pid: resident_kib(pid) for pid in (life.pid("QEMU"), life.pid("shim"))}

    for flood in HELD_BACK.values():
        life.do_as_root(flood)

    took_s, seen = list[float](), set[bytes]()
    began_s = time.monotonic()
    while seen != SHOWN or time.monotonic() < began_s + HELD_BACK_S:
        assert ask_for_state(life, took_s, for_s=1.0) == "RUNNING"
        shown = console.read_bytes()
        assert len(shown) <= CONSOLE_BYTES
        seen |= {text for text in SHOWN if text in shown}
        assert time.monotonic() < began_s + MOMENT_S, SHOWN - seen
    assert_in_time(took_s)
    for pid, size in before.items():
        assert resident_kib(pid) - size < MOST_GROWTH_KIB
    life.remove()

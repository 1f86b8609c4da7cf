"""The agent reports how long its own start and its kernel's took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from guest.agent import kernel, timeline

BOOT = b"""<6>[    0.000000] Linux version 6.1
<6>[    0.700000] Trying to unpack rootfs image as initramfs...
<6>[    0.800000] pci 0000:00:01.0: enabling device (0000 -> 0002)
<6>[    0.900000] Freeing initrd memory: 17000K
<6>[    1.250000] Run /init as init process
<3>[    2.000000] hako-agent: serving
"""
PLUGS = b"""<6>[    6.500000] pci 0000:01:01.0: [1af4:1053] type 00 class 0x078000
<6>[    6.600000] virtio-pci 0000:01:01.0: enabling device (0000 -> 0002)
<6>[    6.800000] virtio-pci 0000:01:02.0: enabling device (0000 -> 0002)
"""


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [1.5, 1.75, 9.0, 9.5, 10.0, 11.0]
    monkeypatch.setattr(timeline, "_noted", [])
    monkeypatch.setattr(timeline, "_lap_s", 0.0)
    # Only this module's: other threads of the test's process ask for the time, too.
    monkeypatch.setattr(timeline, "time", SimpleNamespace(monotonic=lambda: times.pop(0)))


@pytest.mark.parametrize(
    ("log", "kernels"),
    [
        (BOOT, ["0 1.250000 kernel boot", "0.700000 0.900000 kernel unpack the initramfs"]),
        (
            BOOT + PLUGS,
            [
                "0 1.250000 kernel boot",
                "0.700000 0.900000 kernel unpack the initramfs",
                "6.500000 6.800000 kernel take new devices",
            ],
        ),
    ],
    ids=["booted", "cloned"],
)
def test_the_first_report_begins_with_the_kernels_start(
    monkeypatch: pytest.MonkeyPatch, log: bytes, kernels: list[str]
) -> None:
    monkeypatch.setattr(kernel, "messages", lambda: log)
    timeline.lap("interpreter")
    timeline.lap("mounts")
    timeline.note("Check", 8.0)

    assert timeline.report().splitlines() == [
        "9.500000",
        *kernels,
        "1.250000 1.500000 agent interpreter",
        "1.500000 1.750000 agent mounts",
        "8.000000 9.000000 agent Check",
    ]
    assert timeline.report() == "10.000000"


def test_requests_that_wait_for_events_are_left_out() -> None:
    timeline.note("WaitProcess", 1.0)

    assert timeline.report() == "1.500000"

"""The kernel lets processes in a cgroup open the devices that they may use, and no others."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.machine import device_access
from shim.machine.device_access import DeviceAccess
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNTS = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
HIERARCHIES = [
    Path(point)
    for _, point, kind, options, *_ in MOUNTS
    if kind == "cgroup2" or (kind == "cgroup" and "devices" in options.split(","))
]
FULL = (1, 7)
PROBE = """
echo $$ > "$1/cgroup.procs"
for device in null zero full; do
    (: < /dev/$device) 2> /dev/null && echo "$device"
done
rm -f "$2/block"
mknod "$2/block" b 7 200 && echo made
(: < "$2/block") 2> /dev/null && echo opened
true
"""


@pytest.fixture(params=HIERARCHIES, ids=str)
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of one hierarchy that limits devices."""
    directory = request.param / f"hako-test-{secrets.token_hex(4)}"
    directory.mkdir()
    yield directory
    directory.rmdir()


def test_a_process_opens_only_the_allowed_devices_and_may_make_nodes_of_any(
    cgroup: Path, tmp_path: Path
) -> None:
    access = DeviceAccess(cgroup)
    assert access.allow(device_access.HARMLESS)
    assert probe(cgroup, tmp_path) == ["null", "zero", "made"]
    assert access.allow([FULL])
    assert probe(cgroup, tmp_path) == ["null", "zero", "full", "made"]


def probe(cgroup: Path, place: Path) -> list[str]:
    """List what a process in a cgroup can open and make."""
    argv: list[str | Path] = ["/bin/sh", "-c", PROBE, "probe", cgroup, place]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=patient(60), check=True)
    return done.stdout.split()

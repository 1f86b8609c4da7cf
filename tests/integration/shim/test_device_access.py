"""The kernel lets processes in a cgroup open the devices that they may use, and no others."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.machine import device_access
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNTS = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
HIERARCHIES = [
    Path(point)
    for _, point, kind, options, *_ in MOUNTS
    if kind == "cgroup2" or (kind == "cgroup" and "devices" in options.split(","))
]
PROBE = """
echo $$ > "$1/cgroup.procs"
for device in null zero full; do
    (: < /dev/$device) 2> /dev/null && echo "$device"
done
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
    assert device_access.limit(cgroup, device_access.HARMLESS)
    done = subprocess.run(
        ["/bin/sh", "-c", PROBE, "probe", cgroup, tmp_path],
        capture_output=True,
        text=True,
        timeout=patient(10),
        check=True,
    )
    assert done.stdout.split() == ["null", "zero", "made"]

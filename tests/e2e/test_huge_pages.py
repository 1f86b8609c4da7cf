"""A container may use as many huge pages as its specification allows, and a pod's volume consists of them."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from tests.e2e.busybox import PYTHON, PYTHON_MOUNTS
from tests.e2e.by_hand import ByHand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako  # a host has only the pages that its administrator has set aside

MIB = 1 << 20
LIMIT = 64 * MIB
PROGRAM = f"""
import json, mmap, os
found = {{}}
HUGE = 0x40000

def use(size, descriptor=-1, flags=mmap.MAP_SHARED):
    area = mmap.mmap(descriptor, size, flags=flags)
    for place in range(0, size, 4096):
        area[place] = 1
    return area

held = use({LIMIT} // 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | HUGE)
file = os.open("/huge/file", os.O_CREAT | os.O_RDWR)
os.ftruncate(file, {LIMIT} // 4)
kept = use({LIMIT} // 4, file)
try:
    use({LIMIT}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | HUGE)
except OSError as error:
    found["more"] = error.strerror
for line in open("/proc/meminfo"):
    name, value, *_ = line.split()
    if name in ("HugePages_Total:", "HugePages_Free:"):
        found[name] = int(value)
for line in open("/proc/mounts"):
    if line.split()[1] == "/huge":
        found["type"] = line.split()[2]
status = os.stat("/huge")
found["owner"] = [status.st_mode & 0o7777, status.st_uid, status.st_gid]
print(json.dumps(found))
"""


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """An empty volume of huge pages as the kubelet makes one."""
    path = tmp_path / "kubernetes.io~empty-dir" / "huge"
    path.mkdir(parents=True)
    argv: list[str | Path] = [
        "/usr/bin/mount",
        "-t",
        "hugetlbfs",
        "-o",
        "pagesize=2M,gid=1234",
        "nodev",
        path,
    ]
    subprocess.run(argv, check=True)
    path.chmod(0o2770)
    yield path
    subprocess.run(["/usr/bin/umount", path], check=True)


def limited(limit: int) -> dict[str, Any]:
    """Allow a container huge pages of 2 MiB, and none of 1 GiB."""
    limits = [{"pageSize": "2MB", "limit": limit}, {"pageSize": "1GB", "limit": 0}]
    return {"resources": {"hugepageLimits": limits}}


def test_a_container_has_the_huge_pages_that_it_may_use(
    one_stack: Stack, tmp_path: Path, volume: Path
) -> None:
    bind = {"destination": "/huge", "type": "bind", "source": str(volume), "options": ["rbind", "rw"]}
    with ByHand(one_stack, tmp_path, linux=limited(LIMIT), mounts=[*PYTHON_MOUNTS, bind]) as box:
        assert json.loads(box.output(*PYTHON, PROGRAM)) == {
            "more": "Cannot allocate memory",
            "HugePages_Total:": 32,
            "HugePages_Free:": 8,
            "type": "hugetlbfs",
            "owner": [0o2770, 0, 1234],
        }


def test_a_file_system_of_the_hosts_huge_pages_is_refused(
    one_stack: Stack, tmp_path: Path, volume: Path
) -> None:
    (volume / "part").mkdir()
    bind = {"destination": "/huge", "type": "bind", "source": str(volume / "part"), "options": ["rbind"]}
    with pytest.raises(grpc.RpcError, match=r"mounts: /huge: .*: a file system of the host's huge pages"):
        ByHand(one_stack, tmp_path, mounts=[bind]).__enter__()

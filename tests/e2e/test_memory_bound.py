"""A machine that is used hard stays far below the memory that its processes may use on the host."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from shim.machine.cgroup import OVERHEAD_BYTES, counting_roots, memory_bound
from tests.e2e.by_hand import ByHand
from tests.e2e.conftest import new_id
from tests.e2e.containerd import NAMESPACE
from tests.e2e.life import MOMENT_S
from tests.e2e.test_bytes import feed, read_all
from tests.e2e.test_refusals import configured
from tests.network_space import Space, add_cable, new_space
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.nightly, pytest.mark.timeout(1800)]

MIB = 1 << 20
MACHINE, ADDED = 256 * MIB, 512 * MIB
BYTES = 256 * MIB
DISKS, CARDS, MORE_CARDS = 6, 4, 4
SAMPLE_S = 0.05
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
# Memory that no file on a disk can replace, beside the guest's, which is shared memory.
KERNELS = ("kernel", "memory.kmem.usage_in_bytes")
ANONYMOUS = ("anon", "total_rss")


class Watch:
    """The most memory that a cgroup's processes use beside the guest's, by what they do."""

    def __init__(self, directory: Path) -> None:
        self.most: dict[str, int] = {}
        self._directory = directory
        self._phase = "idle"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, phase: str) -> None:
        """Name what the processes do from now on."""
        self._phase = phase

    def now(self) -> int:
        """Read how much they use."""
        lines = (self._directory / "memory.stat").read_text(encoding="ascii").splitlines()
        counters = {name: int(value) for name, value in (line.split() for line in lines)}
        file = self._directory / KERNELS[1]
        if file.exists():
            counters[KERNELS[1]] = int(file.read_text(encoding="ascii"))
        return sum(counters.get(name, 0) for name in (*KERNELS, *ANONYMOUS))

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.most[self._phase] = max(self.most.get(self._phase, 0), self.now())


@contextlib.contextmanager
def loops(place: Path) -> Iterator[list[Path]]:
    """Block devices of the host."""
    devices = []
    try:
        for number in range(DISKS):
            file = place / f"disk-{number}"
            with file.open("wb") as opened:
                opened.truncate(64 * MIB)
            argv: list[str | Path] = ["/usr/sbin/losetup", "--find", "--show", file]
            found = subprocess.run(argv, check=True, capture_output=True, text=True)
            devices.append(Path(found.stdout.strip()))
        yield devices
    finally:
        for device in devices:
            subprocess.run(["/usr/sbin/losetup", "--detach", device], check=True)


def add_cables(pod: Space, outside: Space, numbers: range) -> None:
    for number in numbers:
        add_cable(pod, outside, f"net{number}", number=number)


def cards_in(box: ByHand) -> int:
    return len(box.output("ls", "/sys/class/net").split()) - 1


def copy_both_ways(box: ByHand, data: Path) -> None:
    """Copy bytes into the container and out of it at once, while the reader is slower than the guest."""
    stdin, stdout = box.fifo(), box.fifo()
    with ThreadPoolExecutor() as pool:
        read = pool.submit(read_all, stdout, pace_s=0.002)
        fed = pool.submit(feed, stdin, data)
        exec_id = box.execute("cat", stdin=stdin, stdout=stdout)
        fed.result()
        box.call("CloseIO", exec_id=exec_id, stdin=True)
        assert read.result()[0] == BYTES
    assert box.finish(exec_id) == 0


def test_hotplug_and_streams_leave_half_of_what_is_granted_beside_the_guests_memory(
    one_stack: Stack, tmp_path: Path
) -> None:
    group = f"{NAMESPACE}/{new_id()}"
    roots = counting_roots(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    [directory] = [root / group for root in roots if (root / "memory.stat").exists()]
    with contextlib.ExitStack() as opened:
        outside, pod = opened.enter_context(new_space()), opened.enter_context(new_space())
        disks = opened.enter_context(loops(tmp_path))
        add_cables(pod, outside, range(1, 1 + CARDS))
        numbers = [(f"/dev/disk{number}", disk.stat().st_rdev) for number, disk in enumerate(disks)]
        linux = {
            "cgroupsPath": f"/{group}",
            "namespaces": [
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                {"type": "network", "path": str(pod.path)},
            ],
            "devices": [
                {"path": path, "type": "b", "major": os.major(device), "minor": os.minor(device)}
                for path, device in numbers
            ],
        }
        mounts = [
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/memory", "type": "tmpfs", "source": "tmpfs", "options": ["size=1g"]},
        ]
        hypervisor = f'jail = "required"\nmemory_mib = {MACHINE // MIB}'
        opened.enter_context(configured(one_stack, hypervisor=hypervisor))
        box = opened.enter_context(ByHand(one_stack, tmp_path / "box", mounts=mounts, linux=linux))
        watch = opened.enter_context(Watch(directory))
        assert cards_in(box) == CARDS

        watch.begin("disks")
        paths = " ".join(path for path, _ in numbers)
        box.output("sh", "-c", f"for disk in {paths}; do dd if=/dev/zero of=$disk bs=1M count=64; done")
        watch.begin("network cards")
        add_cables(pod, outside, range(1 + CARDS, 1 + CARDS + MORE_CARDS))
        until(lambda: cards_in(box) == CARDS + MORE_CARDS, within_s=MOMENT_S)
        watch.begin("memory")
        limit = json.dumps({"memory": {"limit": ADDED}}).encode()
        box.call("Update", resources=AnyMessage(type_url=RESOURCES, value=limit))
        box.output("sh", "-c", f"dd if=/dev/zero of=/memory/file bs=1M count={ADDED // MIB * 3 // 4}")
        watch.begin("streams")
        data = tmp_path / "data"
        with data.open("wb") as file:
            for _ in itertools.repeat(None, BYTES // MIB):
                file.write(os.urandom(MIB))
        copy_both_ways(box, data)
        peak = _number(directory, "memory.peak", "memory.max_usage_in_bytes")
        killed = _count_of_kills(directory)
    bound = memory_bound(MACHINE + ADDED)
    print({phase: used // MIB for phase, used in watch.most.items()}, "MiB;", peak // MIB, "of", bound // MIB)
    assert set(watch.most) == {"idle", "disks", "network cards", "memory", "streams"}
    assert max(watch.most.values()) < OVERHEAD_BYTES // 2
    assert peak < bound
    assert killed == 0


def _number(directory: Path, *names: str) -> int:
    [file] = [directory / name for name in names if (directory / name).exists()]
    return int(file.read_text(encoding="ascii"))


def _count_of_kills(directory: Path) -> int:
    [file] = [
        directory / name for name in ("memory.events", "memory.oom_control") if (directory / name).exists()
    ]
    counters = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
    return int(counters["oom_kill"])

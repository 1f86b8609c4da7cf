"""A container that can never start is tried again forever by the kubelet: nothing may grow by that."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.e2e.life import PROGRAMS
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cri.pods import Container, Pod
    from tests.cri.stack import Stack

WARM_UP = 5
GROWTH_KIB = 4096
"""What allocators may take and keep, however often something is tried."""
POOL = min(32, (os.cpu_count() or 1) + 4)
"""As many threads does asyncio's pool hold; it takes another one whenever those that it has are busy."""


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """The resources that a process holds."""

    descriptors: int
    threads: int
    mounts: int

    def is_no_more_than(self, other: Held) -> bool:
        """Tell whether it is no more than before, except for threads of the shim's pool."""
        return (
            self.descriptors <= other.descriptors
            and self.threads <= other.threads + POOL
            and self.mounts <= other.mounts
        )


def held(pid: int) -> Held:
    """Count the resources that a process holds."""
    place = Path(f"/proc/{pid}")
    return Held(
        descriptors=len(list((place / "fd").iterdir())),
        threads=len(list((place / "task").iterdir())),
        mounts=len((place / "mountinfo").read_text(encoding="utf-8").splitlines()),
    )


def memory_kib(pid: int) -> int:
    """Return how much memory a process has for itself."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def free_kib(container: Container) -> int:
    """Return how much memory the guest has left."""
    lines = container.shell("echo 3 > /proc/sys/vm/drop_caches; cat /proc/meminfo").stdout.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemFree:"))


def processes_of(stack: Stack) -> dict[int, str]:
    """Return the processes of the only sandbox by their ids."""
    return {
        process.pid: name
        for process in stack.containerd.nursery.descendants()
        for name, program in PROGRAMS.items()
        if program in process.command and "-zygote" not in process.command
    }


def files_of(stack: Stack) -> set[Path]:
    """Return the files in the sandboxes' state directories."""
    tree = os.walk(stack.state_directory)
    return {Path(place, name) for place, directories, files in tree for name in (*directories, *files)}


@pytest.mark.mainly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.nightly)])
def test_a_container_that_cannot_start_grows_nothing_however_often_it_is_tried(
    stack: Stack, new_pod: Callable[..., Pod], count: int
) -> None:
    if not stack.is_hako:
        pytest.skip("runc's containers can have the socket")
    pod = new_pod("retried")
    path = stack.containerd.home / "retried.sock"
    mounts = [{"container_path": "/bound", "host_path": str(path)}]
    witness = pod.run("witness", "sleep", "100000", linux=pod.linux(privileged=True))

    def attempt() -> None:
        container = pod.create("refused", "true", mounts=mounts)
        with pytest.raises(grpc.RpcError) as caught:
            container.start()
        line = f"mount: {path}: is a socket of the host; a guest can share files and directories"
        assert str(caught.value.details()).endswith(f"failed to create shim task: {line}")
        assert container.status().message.endswith(line)
        container.remove()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        for _ in range(WARM_UP):
            attempt()
        processes = processes_of(stack)
        assert set(processes.values()) >= {"shim", "QEMU", "virtio-fs daemon"}
        files, free = files_of(stack), free_kib(witness)
        before = {pid: held(pid) for pid in processes}
        memory = {pid: memory_kib(pid) for pid in processes}
        for _ in range(count):
            attempt()
        # Threads that have nothing to do end, and files are removed, some time after an attempt.
        until(lambda: processes_of(stack) == processes)
        until(lambda: all(held(pid).is_no_more_than(before[pid]) for pid in processes))
        until(lambda: files_of(stack) <= files)
        grown = {name: memory_kib(pid) - memory[pid] for pid, name in processes.items()}
        grown["guest"] = free - free_kib(witness)
        assert {name: size for name, size in grown.items() if size > GROWTH_KIB} == {}

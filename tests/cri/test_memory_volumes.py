"""An emptyDir with ``medium: Memory``, as a kubelet prepares it, is one tmpfs for all of the pod."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from tests.cri.conftest import counted
from tests.cri.pods import Container, Pod, remove_all, run_pod

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cri.stack import Stack

MIB = 1 << 20
SIZE_MIB = 8
LARGE_MIB = 640
"""More than a machine has from the start."""
GROUP = 2000
UID = "0b9b7a5e-4c1f-4f6e-8d43-1d4f3a1c9d70"


def run_on_host(*argv: str | Path) -> None:
    subprocess.run(argv, check=True)


def mount(*, container_path: str, host_path: Path, **more: Any) -> dict[str, Any]:
    return {"container_path": container_path, "host_path": str(host_path), **more}


@dataclass(frozen=True, slots=True)
class Volume:
    """The volume on the host, the kubelet's bind mounts for its subPaths, and the pod's directory there."""

    path: Path
    kubelet: Path

    def part(self, container: str, below: str, *, mode: int = 0o2777) -> Path:
        """Make the bind mount that a container gets for a subPath."""
        source, target = self.path / below, self.kubelet / "volume-subpaths" / "cache" / container / "0"
        if not source.exists():
            source.mkdir()
            source.chmod(mode)
        target.mkdir(parents=True)
        run_on_host("/usr/bin/mount", "--bind", source, target)
        return target


@pytest.fixture(scope="module")
def volume(either_stack: Stack) -> Iterator[Volume]:
    kubelet = either_stack.containerd.home / "pods" / UID
    path = kubelet / "volumes" / "kubernetes.io~empty-dir" / "cache"
    path.mkdir(parents=True)
    run_on_host("/usr/bin/mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}M", "tmpfs", path)
    try:
        os.chown(path, 0, GROUP)
        path.chmod(0o2777)
        yield Volume(path, kubelet)
    finally:
        for part in (kubelet / "volume-subpaths").glob("*/*/*"):
            run_on_host("/usr/bin/umount", part)
        run_on_host("/usr/bin/umount", path)


@pytest.fixture(scope="module")
def pod(either_stack: Stack) -> Iterator[Pod]:
    pods: list[Pod] = []
    with counted(either_stack):
        try:
            pods.append(run_pod(either_stack, "memory"))
            yield pods[0]
        finally:
            remove_all(pods)


@dataclass(frozen=True, slots=True)
class Users:
    """Containers of the pod: the first was there before the others and is gone."""

    first: list[str]
    app: Container
    sidecar: Container


@pytest.fixture(scope="module")
def users(pod: Pod, volume: Volume) -> Users:
    (volume.path / "seed").write_text("of the kubelet\n")
    whole = mount(container_path="/cache", host_path=volume.path)
    init = pod.run(
        "init",
        "sh",
        "-c",
        "cat /cache/seed; mkdir -m 700 /cache/private; chown 7 /cache/private; echo init >/cache/by-init",
        mounts=[whole],
    )
    assert init.wait_for_exit() == 0
    said = [line.text for line in init.whole_log()]
    init.remove()
    app = pod.run("app", "sleep", "100000", mounts=[whole])
    sidecar = pod.run(
        "sidecar",
        "sleep",
        "100000",
        mounts=[
            mount(container_path="/read", host_path=volume.path, readonly=True),
            mount(container_path="/logs", host_path=volume.part("sidecar", "logs", mode=0o2775)),
        ],
    )
    return Users(said, app, sidecar)


def test_it_is_a_tmpfs_of_the_size_and_the_owners_that_the_kubelet_chose(users: Users) -> None:
    shown = users.app.shell(
        "grep ' /cache ' /proc/mounts | cut -d ' ' -f 1-3; df -k /cache | tail -n 1; stat -c '%a %g' /cache"
    )
    mounted, size, owners = shown.stdout.splitlines()
    assert mounted == "tmpfs /cache tmpfs"
    assert size.split()[1] == str(SIZE_MIB * 1024)
    assert owners == f"2777 {GROUP}"


def test_a_container_finds_the_files_of_the_kubelet_and_of_earlier_containers(users: Users) -> None:
    assert users.first == ["of the kubelet"]
    assert users.app.shell("cat /cache/seed /cache/by-init").stdout == "of the kubelet\ninit\n"
    assert users.app.shell("stat -c '%a %u %g' /cache/private").stdout == f"700 7 {GROUP}\n"


def test_containers_meet_in_it(users: Users) -> None:
    assert users.app.shell("mkfifo /cache/fifo; (echo through >/cache/fifo) >/dev/null 2>&1 &").code == 0
    assert users.sidecar.exec("cat", "/read/fifo").stdout == "through\n"


def test_a_part_of_it_is_the_same_directory(users: Users) -> None:
    assert users.sidecar.shell("echo line >/logs/file; stat -c '%a %g' /logs").stdout == f"2775 {GROUP}\n"
    assert users.app.exec("cat", "/cache/logs/file").stdout == "line\n"
    assert users.app.shell("stat -c %d /cache").stdout == users.sidecar.shell("stat -c %d /logs").stdout


@pytest.mark.inherent("memory-volume-on-host")
def test_the_host_sees_what_a_container_writes_there(users: Users, volume: Volume) -> None:
    assert users.app.shell("echo seen >/cache/by-app").code == 0
    assert (volume.path / "by-app").exists()


def test_it_is_read_only_on_request(users: Users) -> None:
    assert "Read-only file system" in users.sidecar.shell("echo x >/read/no").stderr


def test_it_holds_at_most_its_limit_and_counts_as_memory_of_the_writer(users: Users) -> None:
    held = "awk '$1 == \"shmem\" {print $2}' /sys/fs/cgroup/memory.stat"
    before = users.app.shell(held).stdout
    full = users.app.exec("dd", "if=/dev/zero", "of=/cache/large", "bs=64k", f"count={2 * SIZE_MIB * 16}")
    assert (full.code, "No space left on device" in full.stderr) == (1, True)
    after = users.app.shell(held).stdout
    users.app.exec("rm", "/cache/large")
    if before:  # the host may have no control group of memory
        assert int(after) - int(before) > (SIZE_MIB - 1) * MIB


def test_a_pod_without_limits_can_fill_its_volume(either_stack: Stack, pod: Pod, users: Users) -> None:
    path = either_stack.containerd.home / "large" / "kubernetes.io~empty-dir" / "large"
    path.mkdir(parents=True)
    run_on_host("/usr/bin/mount", "-t", "tmpfs", "-o", f"size={LARGE_MIB}M", "tmpfs", path)
    try:
        container = pod.run(
            "large", "sleep", "100000", mounts=[mount(container_path="/large", host_path=path)]
        )
        fill = ("dd", "if=/dev/zero", "of=/large/file", "bs=1M", f"count={LARGE_MIB}")
        assert container.exec(*fill).code == 0
        assert container.exec("rm", "/large/file").code == 0
        container.remove()
    finally:
        run_on_host("/usr/bin/umount", path)


def test_a_part_that_a_container_has_made_first_is_as_it_made_it(
    users: Users, pod: Pod, volume: Volume
) -> None:
    assert users.app.shell("mkdir -m 750 /cache/made; chown 7 /cache/made; touch /cache/made/file").code == 0
    part = volume.part("late", "made")  # a kubelet that finds none on the host makes one
    late = pod.run("late", "sleep", "100000", mounts=[mount(container_path="/made", host_path=part)])
    try:
        assert late.shell("ls /made; stat -c '%a %u' /made").stdout == "file\n750 7\n"
    finally:
        late.remove()


def test_a_link_in_a_subpath_never_leads_out_of_the_volume(users: Users, pod: Pod, volume: Volume) -> None:
    part = volume.part("astray", "out")  # before a container puts a link there
    assert users.app.shell("rm -rf /cache/out; ln -s /etc /cache/out").code == 0
    if not pod.stack.is_hako:  # the kubelet has bound the directory already
        return
    with pytest.raises(grpc.RpcError) as refused:
        pod.run("astray", "true", mounts=[mount(container_path="/out", host_path=part)])
    assert "symbolic links" in str(refused.value.details())

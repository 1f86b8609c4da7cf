"""The volumes of a pod's containers, as a kubelet prepares them on the host."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from tests.kubelet_volume import publish
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cri.conftest import Duo
    from tests.cri.pods import Container

pytestmark = pytest.mark.mainly

MIB = 1 << 20
CONTENT = os.urandom(MIB)
WITHIN_S = patient(100.0)
BIDIRECTIONAL = 2
"""As a mount's propagation."""


@pytest.fixture(scope="module")
def place(duo: Duo) -> Path:
    path = duo.pod.stack.containerd.home / "volumes"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def config_map(place: Path) -> Path:
    path = place / "kubernetes.io~configmap" / "settings"
    path.mkdir(parents=True)
    publish(path, "..1", {"key": "first"})
    return path


@pytest.fixture(scope="module")
def memory(place: Path) -> Iterator[Path]:
    """An emptyDir in memory with a size limit, which the kubelet mounts."""
    path = place / "kubernetes.io~empty-dir" / "memory"
    path.mkdir(parents=True)
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", path], check=True)
    yield path
    subprocess.run(["/usr/bin/umount", path], check=True)


@pytest.fixture(scope="module")
def disk(place: Path) -> Iterator[Path]:
    """A volume of the kind Block."""
    backing = place / "disk"
    backing.write_bytes(CONTENT)
    argv: list[str | Path] = ["/usr/sbin/losetup", "--find", "--show", backing]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    yield type(place)(device)
    subprocess.run(["/usr/sbin/losetup", "--detach", device], check=True)


@pytest.fixture(scope="module")
def fields(place: Path, config_map: Path, memory: Path, disk: Path) -> dict[str, Any]:
    """The volumes of two containers of the pod."""
    (place / "termination-log").touch()
    (place / "data" / "part").mkdir(parents=True)
    mounts = {
        "/config": (config_map, True),
        "/memory": (memory, False),
        "/dev/termination-log": (place / "termination-log", False),
        "/part": (place / "data" / "part", False),
    }
    return {
        "mounts": [
            {"container_path": path, "host_path": str(source), "readonly": readonly}
            for path, (source, readonly) in mounts.items()
        ],
        "devices": [{"container_path": "/dev/block", "host_path": str(disk), "permissions": "rwm"}],
    }


@pytest.fixture(scope="module")
def user(duo: Duo, fields: dict[str, Any]) -> Iterator[Container]:
    container = duo.pod.run("user", "sleep", "100000", **fields)
    yield container
    container.remove()


def test_a_config_map_is_there_cannot_be_written_and_follows_its_changes(
    user: Container, config_map: Path
) -> None:
    assert user.exec("cat", "/config/key").stdout == "first"
    assert "Read-only" in user.shell("echo no > /config/new").stderr
    publish(config_map, "..2", {"key": "second"})
    deadline = time.monotonic() + WITHIN_S
    while user.exec("cat", "/config/key").stdout != "second":
        assert time.monotonic() < deadline


def test_a_volume_in_memory_is_shared_by_the_pod_and_holds_no_more_than_its_limit(
    duo: Duo, user: Container, fields: dict[str, Any]
) -> None:
    other = duo.pod.run("other", "sleep", "100000", mounts=fields["mounts"])
    try:
        assert user.shell("echo shared > /memory/file").code == 0
        assert other.exec("cat", "/memory/file").stdout == "shared\n"
        full = other.exec("dd", "if=/dev/zero", "of=/memory/large", "bs=64k", "count=32")
        assert (full.code, "No space left on device" in full.stderr) == (1, True)
    finally:
        other.remove()


def test_a_volume_at_dev_shm_is_that_volume_and_the_pods_shared_memory_is_protected(
    duo: Duo, memory: Path
) -> None:
    listed = duo.server.shell("grep ' /dev/shm ' /proc/mounts; df -k /dev/shm | tail -n 1").stdout
    mounted, size = listed.splitlines()
    assert {"nosuid", "nodev", "noexec"} <= set(mounted.split()[3].split(","))
    assert size.split()[1] == "65536"
    mounts = [{"container_path": "/dev/shm", "host_path": str(memory)}]
    other = duo.pod.run("large", "sleep", "100000", mounts=mounts)
    try:
        assert other.shell("df -k /dev/shm | tail -n 1").stdout.split()[1] == "1024"
    finally:
        other.remove()


def test_the_last_words_of_a_container_reach_the_kubelet(user: Container, place: Path) -> None:
    assert user.shell("echo why it ended > /dev/termination-log").code == 0
    assert (place / "termination-log").read_text() == "why it ended\n"


def test_a_container_with_a_subpath_sees_only_that_part_of_the_volume(user: Container, place: Path) -> None:
    (place / "data" / "beside").write_text("not yours")
    assert user.shell("touch /part/mine; ls /part /part/..").stdout.count("beside") == 0
    assert (place / "data" / "part" / "mine").exists()


@pytest.mark.skipif("config.getoption('handler') == 'runc'", reason="runc shows it as the host's own number")
def test_a_block_volume_is_a_disk_of_the_machine(user: Container) -> None:
    assert user.exec("sha256sum", "/dev/block").stdout.split()[0] == hashlib.sha256(CONTENT).hexdigest()
    assert user.exec("stat", "-c", "%F", "/dev/block").stdout == "block special file\n"


@pytest.mark.skipif("config.getoption('handler') == 'runc'", reason="runc's containers can connect to it")
def test_a_socket_of_the_host_in_a_bind_mount_is_refused_by_name(duo: Duo, place: Path) -> None:
    path = place / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        mounts = [{"container_path": "/bound", "host_path": str(path)}]
        container = duo.pod.create("refused", "true", mounts=mounts)
        try:
            with pytest.raises(grpc.RpcError, match=f"{path}: is a socket of the host"):
                container.start()
        finally:
            container.remove()


@pytest.mark.skipif("config.getoption('handler') == 'runc'", reason="runc's containers mount on the host")
def test_mounts_of_a_container_that_the_host_is_to_see_are_refused_by_name(duo: Duo, place: Path) -> None:
    path = place / "both-ways"
    path.mkdir()
    subprocess.run(["/usr/bin/mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["/usr/bin/mount", "--make-shared", path], check=True)
        mounts = [{"container_path": "/both", "host_path": str(path), "propagation": BIDIRECTIONAL}]
        container = duo.pod.create("refused", "true", mounts=mounts, linux=duo.pod.linux(privileged=True))
        try:
            with pytest.raises(grpc.RpcError, match=r"mounts: /both: rshared \(Bidirectional\): .* stay in"):
                container.start()
        finally:
            container.remove()
    finally:
        subprocess.run(["/usr/bin/umount", path], check=True)

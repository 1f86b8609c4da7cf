"""A mount's source tells whether it is the pod's shared memory, which the guest provides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from shim.agent import shared_memory
from shim.agent.guest_paths import SHM_BYTES, SHM_DIRECTORY

if TYPE_CHECKING:
    from pathlib import Path

ID = "0123456789abcdef"
IDS = {ID, "sandbox"}
OF_MANAGERS = [
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/sandbox/shm",
    f"/var/lib/docker/containers/{ID}/mounts/shm",
    f"/var/lib/nerdctl/1935db59/containers/default/{ID}/shm",
    f"/var/lib/containers/storage/overlay-containers/{ID}/userdata/shm",
    shared_memory.source_of("sandbox"),
]
VOLUMES = [
    "/var/lib/kubelet/pods/4f1/volumes/kubernetes.io~empty-dir/shm",
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/another/shm",
    f"/srv/{ID}/shm",
    f"/var/lib/docker/containers/{ID}/mounts/shm/below",
    "/run/shm",
    "/dev/shm",
    "",
]


def bind(source: str, destination: str = "/dev/shm", **more: Any) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, **more}


@pytest.mark.parametrize("source", OF_MANAGERS)
def test_shared_memory_made_for_the_sandbox_is_the_pods(source: str) -> None:
    assert shared_memory.is_pods(bind(source), ids=IDS, shares_hosts_ipc=False)
    assert shared_memory.is_pods(bind(source, "/dev/shm/"), ids=IDS, shares_hosts_ipc=False)
    assert not shared_memory.is_pods(bind(source, "/elsewhere"), ids=IDS, shares_hosts_ipc=False)


@pytest.mark.parametrize("source", VOLUMES)
def test_a_volume_at_dev_shm_is_a_volume(source: str) -> None:
    assert not shared_memory.is_pods(bind(source), ids=IDS, shares_hosts_ipc=False)


def test_a_tmpfs_at_dev_shm_is_the_containers_own() -> None:
    entry = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}
    assert not shared_memory.is_pods(entry, ids=IDS, shares_hosts_ipc=False)


def test_with_the_hosts_ipc_the_hosts_shared_memory_is_the_pods() -> None:
    assert shared_memory.is_pods(bind("/dev/shm"), ids=IDS, shares_hosts_ipc=True)


def test_the_bind_mount_keeps_its_own_options_and_the_file_systems() -> None:
    sent = shared_memory.in_guest(bind("/x", options=["rbind", "rprivate", "ro"]))
    assert sent["source"] == SHM_DIRECTORY
    assert sent["options"] == ["rbind", "noexec", "nosuid", "nodev", "rprivate", "ro"]


def spec_of(entry: dict[str, Any]) -> dict[str, Any]:
    return {"mounts": [entry], "linux": {"namespaces": [{"type": "ipc"}]}}


def test_its_size_is_the_size_of_the_file_system_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Status:
        f_blocks = 768
        f_frsize = 4096

    monkeypatch.setattr("os.path.ismount", lambda _: True)
    monkeypatch.setattr("os.statvfs", lambda _: Status)
    assert shared_memory.size_of(spec_of(bind(OF_MANAGERS[1])), container_id=ID) == 3 << 20
    assert shared_memory.size_of(spec_of(bind("/srv/shm")), container_id=ID) == SHM_BYTES


def test_a_plain_directory_does_not_get_its_disks_size(tmp_path: Path) -> None:
    source = tmp_path / "containers" / ID / "mounts" / "shm"
    source.mkdir(parents=True)
    assert shared_memory.size_of(spec_of(bind(str(source))), container_id=ID) == SHM_BYTES


@pytest.mark.parametrize("mounts", [None, 5, "text", [5], [{}], [bind("a\0b")]])
def test_a_malformed_specification_gets_the_usual_size(mounts: Any) -> None:
    assert shared_memory.size_of({"mounts": mounts}, container_id=ID) == SHM_BYTES

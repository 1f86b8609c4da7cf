"""The features of each handler: containerd 2 reports them, and the kubelet refuses pods by them."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.cri.conftest import counted
from tests.cri.pods import run_pod
from tests.cri.stack import BY_PATH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cri.conftest import Duo
    from tests.cri.stack import Stack

pytestmark = pytest.mark.mainly

IDS = [{"host_id": 100000, "container_id": 0, "length": 65536}]


@pytest.fixture
def volume(stack: Stack) -> Iterator[Path]:
    """A directory of the host with a file system mounted below it."""
    if stack.kind.release.config_version < 3:
        pytest.skip("containerd 1 does not ask runtimes")
    path = stack.containerd.home / "volume"
    (path / "below").mkdir(parents=True)
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "tmpfs", path / "below"], check=True)
    yield path
    subprocess.run(["/usr/bin/umount", path / "below"], check=True)
    (path / "below").rmdir()
    path.rmdir()


def test_containerd_reports_the_features_of_each_handler(stack: Stack) -> None:
    if stack.kind.release.config_version < 3:
        pytest.skip("containerd 1 does not ask runtimes")
    features = {
        handler.name: (handler.features.recursive_read_only_mounts, handler.features.user_namespaces)
        for handler in stack.cri.call("Status").runtime_handlers
        if handler.HasField("features")
    }
    assert features[BY_PATH] == (True, False)
    if stack.kind.release.name == "2.1":  # it asks by the type; those from 2.2 on ask every handler
        assert "hako" not in features
    else:
        assert features["hako"] == (True, False)


@pytest.mark.parametrize("handler", ["runc", BY_PATH])
def test_a_recursive_read_only_mount_is_read_only_below_too(stack: Stack, volume: Path, handler: str) -> None:
    with counted(stack):
        pod = run_pod(dataclasses.replace(stack, handler=handler), "recursive")
        try:
            container = pod.run(
                "one",
                *("sleep", "100000"),
                mounts=[
                    {"container_path": path, "host_path": str(volume), "readonly": True, **recursive}
                    for path, recursive in (("/all", {"recursive_read_only": True}), ("/itself", {}))
                ],
            )
            assert "Read-only file system" in container.shell("echo no > /all/below/file").stderr
            assert "Read-only file system" in container.shell("echo no > /all/file").stderr
            assert "Read-only file system" in container.shell("echo no > /itself/file").stderr
            assert container.shell("echo yes > /itself/below/file").code == 0
            assert (volume / "below" / "file").read_text() == "yes\n"
        finally:
            pod.remove()


def test_a_volume_with_mapped_ids_is_refused_by_name(duo: Duo) -> None:
    stack = duo.pod.stack
    if stack.kind.release.config_version < 3:
        pytest.skip("containerd 1.6 knows no mapped ids, and 1.7 leaves them to the runtime")
    mounts = [{"container_path": "/v", "host_path": "/tmp", "uidMappings": IDS, "gidMappings": IDS}]
    container = duo.pod.create("mapped", "true", mounts=mounts)
    try:
        with pytest.raises(grpc.RpcError, match=r"idmap mounts not supported: .*mountExtensions\.idmap"):
            container.start()
    finally:
        container.remove()

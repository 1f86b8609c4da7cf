"""Hooks on the host prepare a container's network when it is created, and clean up after its end."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.busybox import rootfs_archive
from tests.e2e.conftest import new_id
from tests.network_space import new_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.conftest import Stack
    from tests.e2e.containerd import Result
    from tests.network_space import Space

pytestmark = pytest.mark.hako


@pytest.fixture
def outside() -> Iterator[Space]:
    with new_space() as space:
        yield space


@pytest.fixture
def run(one_stack: Stack, tmp_path: Path) -> Callable[..., Result]:
    """Run a container with hooks: shell scripts, each of which stores its input in a file beside it."""
    with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
        archive.extractall(tmp_path / "rootfs", filter="fully_trusted")  # noqa: S202 - made by this test

    def run(name: str, *options: str, annotations: dict[str, str] | None = None, **scripts: str) -> Result:
        spec: dict[str, Any] = {
            "ociVersion": "1.1.0",
            "process": {
                "args": ["sleep", "100000"],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "capabilities": {kind: ["CAP_NET_RAW"] for kind in ("bounding", "permitted", "effective")},
            },
            "root": {"path": str(tmp_path / "rootfs")},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "annotations": {"com.example.key": "value", **(annotations or {})},
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
            "hooks": {
                kind: [
                    {
                        "path": "/bin/sh",
                        "args": ["hook", "-ec", f"cd {shlex.quote(str(tmp_path))}; cat > {kind}; {script}"],
                        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                        "timeout": 60,
                    }
                ]
                for kind, script in scripts.items()
            },
        }
        (tmp_path / "config.json").write_text(json.dumps(spec))
        daemon = one_stack.containerd
        config = tmp_path / "config.json"
        return daemon.ctr("run", "--runtime", daemon.runtime, *options, "--config", config, name)

    return run


def test_a_container_has_the_interface_that_a_hook_puts_next_to_its_task(
    one_stack: Stack, run: Callable[..., Result], outside: Space, tmp_path: Path
) -> None:
    outside.ip("link add eth0 type veth peer name given")
    outside.ip("addr add 10.9.0.1/24 dev eth0")
    outside.ip("link set eth0 up")
    attach = f"""
        pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/' createRuntime)
        nsenter --target {outside.pid} --net ip link set given netns $pid name eth0
        nsenter --net=/proc/$pid/ns/net ip addr add 10.9.0.2/24 dev eth0
        nsenter --net=/proc/$pid/ns/net ip link set eth0 up
        readlink /proc/self/ns/mnt > mounts"""
    daemon, name = one_stack.containerd, new_id()
    started = run(name, "--detach", createRuntime=attach, poststart=":", poststop=":")
    try:
        assert started.code == 0, started.stderr
        pinged = daemon.exec(name, new_id(), "ping", "-c", "1", "-W", "30", "10.9.0.1")
        assert pinged.code == 0, pinged.stdout
        creating, running = (
            json.loads((tmp_path / kind).read_text()) for kind in ("createRuntime", "poststart")
        )
        assert (creating["id"], creating["status"]) == (name, "creating")
        assert creating["annotations"] == {"com.example.key": "value"}
        assert creating["pid"] == daemon.tasks()[name][0]
        assert running == {**creating, "status": "running"}
        # A hook's mounts are visible to all processes: they are not in the shim's own mount namespace.
        assert (tmp_path / "mounts").read_text().strip() == str(Path(f"/proc/{daemon.pid}/ns/mnt").readlink())
        assert not (tmp_path / "poststop").exists()
    finally:
        daemon.remove(name)
    del creating["pid"]
    assert json.loads((tmp_path / "poststop").read_text()) == {**creating, "status": "stopped"}


@pytest.mark.parametrize(
    "kind",
    ["container", pytest.param("sandbox", marks=pytest.mark.nightly)],  # a sandbox is a pod's pause container
)
def test_a_hook_that_fails_prevents_the_container_and_nothing_is_left(
    one_stack: Stack, run: Callable[..., Result], tmp_path: Path, kind: str
) -> None:
    name = new_id()
    pod = {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": name}
    refused = run(
        name, "--rm", annotations=pod, createRuntime="echo no address is free >&2; exit 3", poststop=":"
    )
    assert (refused.code, len(refused.stderr.strip().splitlines())) == (1, 1), refused.stderr
    assert "hooks.createRuntime[0] /bin/sh: exit status 3: no address is free" in refused.stderr
    assert json.loads((tmp_path / "poststop").read_text())["status"] == "stopped"
    assert name not in one_stack.containerd.containers()

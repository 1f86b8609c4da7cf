"""Containers of a specification written here, with a root file system that many of them share."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.busybox import rootfs_archive
from tests.e2e.conftest import new_id
from tests.e2e.containerd import ATTEMPTS_OF_RUNC

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

NAMESPACES = ("pid", "ipc", "uts", "mount", "network")


@contextmanager
def unpacked(home: Path) -> Iterator[Path]:
    """Make a directory of the host with a root file system in ``rootfs``."""
    with tempfile.TemporaryDirectory(dir=home, prefix="bundled-") as directory:
        with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
            archive.extractall(Path(directory, "rootfs"), filter="fully_trusted")  # noqa: S202 - made by this test
        yield Path(directory)


def specification(
    place: Path, script: tuple[str, ...], mounts: list[dict[str, Any]], annotations: dict[str, str]
) -> dict[str, Any]:
    """Describe a container that runs a script as root.

    :param place: what :func:`unpacked` has made.
    :param script: its lines.
    :param mounts: its mounts beside /proc and /dev.
    :param annotations: what else is said of it.
    """
    return {
        "ociVersion": "1.1.0",
        "annotations": annotations,
        "process": {
            "args": ["sh", "-c", "\n".join(script)],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
        },
        "root": {"path": str(place / "rootfs")},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            *mounts,
        ],
        "linux": {"namespaces": [{"type": kind} for kind in NAMESPACES]},
    }


def run(
    stack: Stack,
    place: Path,
    *script: str,
    mounts: list[dict[str, Any]],
    name: str | None = None,
    annotations: dict[str, str] | None = None,
    fails: bool = False,
) -> str:
    """Run a script in a container to its end.

    :param place: what :func:`unpacked` has made.
    :param mounts: its mounts beside /proc and /dev.
    :param name: the container's id; by default a new one.
    :param annotations: what else is said of it.
    :param fails: whether it must fail.
    :returns: its output; if it must fail, the error of ctr.
    """
    name = name or new_id()
    config = _write(place, name, specification(place, script, mounts, annotations or {}))
    containerd = stack.containerd
    for _ in range(1 if stack.is_hako else ATTEMPTS_OF_RUNC):
        try:
            done = containerd.ctr("run", "--runtime", containerd.runtime, "--config", config, name)
        finally:
            containerd.remove(name)
        assert (done.code != 0) == fails, done.stderr
        if done.stdout or fails:
            break
    return done.stderr if fails else done.stdout


def begin(stack: Stack, place: Path, *script: str, name: str, annotations: dict[str, str]) -> None:
    """Start a container that goes on; the caller removes it.

    :param place: what :func:`unpacked` has made.
    :param name: the container's id.
    :param annotations: what else is said of it.
    """
    config = _write(place, name, specification(place, script, [], annotations))
    containerd = stack.containerd
    done = containerd.ctr("run", "--detach", "--runtime", containerd.runtime, "--config", config, name)
    assert done.code == 0, done.stderr


def _write(place: Path, name: str, spec: dict[str, Any]) -> Path:
    config = place / f"{name}.json"
    config.write_text(json.dumps(spec))
    return config


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    """Describe a bind mount."""
    return {"destination": destination, "type": "bind", "source": str(source), "options": list(options)}

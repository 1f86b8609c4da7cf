"""A container with its own specification, and execs with complete process descriptions."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from tests.e2e.busybox import rootfs_archive
from tests.e2e.conftest import new_id
from tests.e2e.containerd import ATTEMPTS_OF_RUNC
from tests.e2e.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.e2e.conftest import Stack
    from tests.e2e.containerd import Result

PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"]
ROOT: dict[str, Any] = {"env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
SETS = ("bounding", "effective", "permitted")


def specification(rootfs: Path, **process: Any) -> dict[str, Any]:
    """Describe a container with little besides a process."""
    return {
        "ociVersion": "1.1.0",
        "process": {**ROOT, "capabilities": dict.fromkeys(SETS, CAPABILITIES), **process},
        "root": {"path": str(rootfs)},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }


def unpack_rootfs(path: Path) -> None:
    """Make a root file system with busybox."""
    with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
        archive.extractall(path, filter="fully_trusted")  # noqa: S202 - made by the tests


def run(stack: Stack, config: Path, spec: Mapping[str, Any], *options: str) -> Result:
    """Run a container that a specification describes.

    :param config: a file for the specification.
    :param spec: the specification.
    :param options: of ``ctr run``; without ``--detach`` it is run to its end and removed.
    """
    config.write_text(json.dumps(spec))
    containerd, name = stack.containerd, new_id()
    try:
        return containerd.ctr("run", "--runtime", containerd.runtime, *options, "--config", config, name)
    finally:
        if name in containerd.containers():
            containerd.remove(name)


@dataclass(frozen=True, slots=True)
class Described:
    """A container that runs, and a directory for what its execs say."""

    stack: Stack
    name: str
    place: Path

    def exec(self, *args: str, **process: Any) -> tuple[int, str]:
        """Run a process that is described whole, as a client other than ctr can.

        :param args: its command line; it may run more than once under runc if it says nothing.
        :param process: the rest of its description, where it is not that of a plain process of root.
        :returns: its exit status and both outputs.
        :raises grpc.RpcError: if it cannot be started.
        """
        for _ in range(1 if self.stack.is_hako else ATTEMPTS_OF_RUNC):
            status, said = self._exec_once({**ROOT, "args": args, **process})
            if said:
                break
        return status, said

    def _exec_once(self, described: Mapping[str, Any]) -> tuple[int, str]:
        exec_id = new_id()
        # A file for each: some runtimes have both write to the beginning of one.
        outputs = [self.place / f"{exec_id}-{name}" for name in ("out", "err")]
        for output in outputs:
            output.touch()
        stdout, stderr = (f"file://{output}" for output in outputs)
        with Tasks(self.stack.containerd.address) as tasks:
            spec = {"type_url": PROCESS_TYPE, "value": json.dumps(described).encode()}
            tasks.call("Exec", self.name, exec_id=exec_id, spec=spec, stdout=stdout, stderr=stderr)
            try:
                tasks.call("Start", self.name, exec_id=exec_id)
                status = tasks.call("Wait", self.name, exec_id=exec_id).exit_status
            finally:
                tasks.call("DeleteProcess", self.name, exec_id=exec_id)
        return status, "".join(output.read_text() for output in outputs)

    def shell(self, script: str, **process: Any) -> str:
        """Run a script that must succeed, and return its output."""
        status, said = self.exec("sh", "-c", script, **process)
        assert status == 0, said
        return said

    def refusal(self, *args: str, **process: Any) -> str:
        """Return why a process cannot be started."""
        try:
            outcome = self.exec(*args, **process)
        except grpc.RpcError as error:
            return str(error.details())
        raise AssertionError(f"{args} {process}: it ran: {outcome}")

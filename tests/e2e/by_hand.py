"""A container driven over the shim's own gRPC socket: exact about streams, and cheap to run commands in."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.protobuf import any_pb2
from google.protobuf.message_factory import GetMessageClass

from proto.containerd import task_v3_pb2
from tests.e2e.busybox import rootfs_archive
from tests.e2e.conftest import new_id
from tests.e2e.containerd import CALL_TIMEOUT_S, SHIM_DIRECTORY, SYSTEM_PATH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

    from tests.e2e.conftest import Stack

TASK = task_v3_pb2.DESCRIPTOR.services_by_name["Task"]
PROCESS = {"cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted")
PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"


class ByHand:
    """A container whose init sleeps, in a sandbox that no containerd knows.

    :param stack: where the shim's configuration and the ancestor of its processes are.
    :param place: an empty directory for the bundle and the FIFOs.
    :param mounts: more mounts of its specification.
    :param linux: more of the ``linux`` object of its specification.
    :param capabilities: what its processes may do.
    :param process: more of the ``process`` object of its specification.
    :param disk: a file that becomes an ext4 file system with its root file system, and then serves as its
        root.
    """

    def __init__(
        self,
        stack: Stack,
        place: Path,
        *,
        mounts: Sequence[dict[str, Any]] = (),
        linux: dict[str, Any] | None = None,
        capabilities: Sequence[str] = (),
        process: dict[str, Any] | None = None,
        disk: Path | None = None,
    ) -> None:
        self.id = new_id()
        self.place = place
        self.rootfs = place / "rootfs"
        self._stack = stack
        self._bundle = place / "bundle"
        self._numbers = itertools.count(1)
        self._process = {**PROCESS, "capabilities": {kind: list(capabilities) for kind in CAPABILITY_SETS}}
        with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
            archive.extractall(self.rootfs, filter="fully_trusted")  # noqa: S202 - made by this very test
        (self._bundle / "rootfs").mkdir(parents=True)
        self._root = {"type": "bind", "source": str(self.rootfs), "options": ["rbind", "rw"]}
        if disk is not None:
            argv = ["/usr/sbin/mkfs.ext4", "-q", "-d", str(self.rootfs), str(disk), "64M"]
            subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
            self._root = {"type": "ext4", "source": str(disk), "options": ["loop", "rw"]}
        spec = {
            "ociVersion": "1.0.2",
            "process": {"args": ["sleep", "100000"], **self._process, **(process or {})},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, *mounts],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
                **(linux or {}),
            },
        }
        (self._bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")

    def __enter__(self) -> Self:
        self._act("start")
        self._state = Path(self._stack.record(self.id).state_directory)
        self._channel = grpc.insecure_channel(f"unix://{self._state}/grpc.sock")
        try:
            self.call("Create", bundle=str(self._bundle), rootfs=[self._root])
            self.call("Start")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._state.exists():
            with contextlib.suppress(grpc.RpcError):
                self.call("Kill", is_there=True, signal=9, all=True)
                self.call("Wait", is_there=True)
                self.call("Delete", is_there=True)
                self.call("Shutdown", is_there=True)
        self._channel.close()
        self._act("delete", "-bundle", self._bundle)
        for fifo in self.place.glob("fifo-*"):  # a thread may wait for an end that nobody opened
            os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))

    def _act(self, action: str, *flags: str | Path) -> None:
        nursery = self._stack.containerd.nursery
        output = self.place / action
        pid = nursery.spawn(
            [
                SHIM_DIRECTORY / "containerd-shim-hako-v2",
                *("-namespace", "by-hand", "-id", self.id),
                *("-address", self._stack.containerd.address, "-publish-binary", "/bin/true"),
                *flags,
                action,
            ],
            environment={
                "PATH": SYSTEM_PATH,
                "HAKO_CONFIG": str(self._stack.config),
                "TTRPC_ADDRESS": str(self.place / "events.sock"),
                "MAX_SHIM_VERSION": "2",
            },
            directory=self._bundle,
            stdout=output,
            stderr=output,
        )
        status = nursery.wait(pid, timeout_s=CALL_TIMEOUT_S)
        assert status == 0, output.read_text()

    def call(
        self, name: str, *, timeout_s: float = CALL_TIMEOUT_S, is_there: bool = False, **fields: Any
    ) -> Any:
        """Call one method of the task service, on the container unless ``id`` names another.

        :param is_there: do not wait for a shim that does not serve, because it has been serving.
        """
        method = TASK.methods_by_name[name]
        request: type[Message] = GetMessageClass(method.input_type)
        response: type[Message] = GetMessageClass(method.output_type)
        call = self._channel.unary_unary(
            f"/{TASK.full_name}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        wanted = request(**{"id": self.id, **fields})
        return call(wanted, timeout=timeout_s, wait_for_ready=not is_there)

    def execute(self, *command: str, **streams: Path | str) -> str:
        """Begin a process in the container.

        :param command: its arguments.
        :param streams: the FIFOs of its ``stdin``, ``stdout`` and ``stderr``.
        :returns: its exec id.
        """
        exec_id = f"exec-{next(self._numbers)}"
        document = json.dumps({"args": command, **self._process}).encode()
        spec = any_pb2.Any(type_url=PROCESS_TYPE, value=document)
        paths: dict[str, Any] = {name: str(path) for name, path in streams.items()}
        self.call("Exec", exec_id=exec_id, spec=spec, **paths)
        self.call("Start", exec_id=exec_id)
        return exec_id

    def finish(self, exec_id: str) -> int:
        """Wait for a process's end, delete it and return its exit status."""
        status = self.call("Wait", exec_id=exec_id).exit_status
        assert self.call("Delete", exec_id=exec_id).exit_status == status
        return int(status)

    def output(self, *command: str) -> str:
        """Run a process that must succeed, and return its output."""
        path = self.place / f"output-{next(self._numbers)}"
        exec_id = self.execute(*command, stdout=f"file://{path}", stderr=f"file://{path}")
        status = self.finish(exec_id)
        text = path.read_text(encoding="utf-8")
        assert status == 0, text
        return text

    def fifo(self) -> Path:
        """Make a FIFO."""
        path = self.place / f"fifo-{next(self._numbers)}"
        os.mkfifo(path, 0o700)
        return path

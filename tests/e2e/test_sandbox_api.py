"""containerd's sandbox service, as containerd 2 drives it with ``sandboxer = "shim"``: by hand, over gRPC."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from proto.containerd import cgroups_v1_pb2, cgroups_v2_pb2, sandbox_v1_pb2, task_v3_pb2
from proto.cri.pod_pb2 import DNSConfig, PodSandboxConfig
from shim.sandbox.killing import ALONE_TIMEOUT_S
from tests.e2e.by_hand import PROCESS, ByHand
from tests.e2e.containerd import CALL_TIMEOUT_S
from tests.e2e.life import PROGRAMS, stopped, until
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.timeout(240)]

SANDBOX = sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"]
TASK = task_v3_pb2.DESCRIPTOR.services_by_name["Task"]
NOTICED_S = patient(30.0)


class SandboxByHand(ByHand):
    """A sandbox that no containerd knows, in its own network namespace, and a container to be in it.

    :param metadata: what each request carries.
    """

    def __init__(
        self, stack: Stack, place: Path, *, metadata: tuple[tuple[str, str | bytes], ...] = ()
    ) -> None:
        super().__init__(stack, place)
        self._metadata = metadata
        self.container = f"{self.id}-container"
        self.container_bundle = self._bundle
        self._bundle = place / "sandbox"
        self._bundle.mkdir()
        self.network_namespace = place / "netns"
        self.network_namespace.touch()

    def __enter__(self) -> Self:
        subprocess.run(["/usr/bin/unshare", f"--net={self.network_namespace}", "true"], check=True)
        self._act("start")
        state = self._stack.record(self.id).state_directory
        self._channel = grpc.insecure_channel(f"unix://{state}/grpc.sock")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(grpc.RpcError):
            self._begin(SANDBOX, "ShutdownSandbox", is_there=True, sandbox_id=self.id).result()
        self._channel.close()
        self._act("delete", "-bundle", self._bundle)
        subprocess.run(["/usr/bin/umount", self.network_namespace], check=True)

    def begin(self, name: str, **fields: Any) -> Any:
        """Call a method of the sandbox service; return the call, which is under way."""
        return self._begin(SANDBOX, name, sandbox_id=self.id, **fields)

    def sandbox(self, name: str, **fields: Any) -> Any:
        """Call a method of the sandbox service and return its answer."""
        return self.begin(name, **fields).result()

    def begin_task(self, name: str, **fields: Any) -> Any:
        """Call a method of the task service on the container; return the call, which is under way."""
        return self._begin(TASK, name, id=self.container, **fields)

    def task(self, name: str, **fields: Any) -> Any:
        """Call a method of the task service on the container and return its answer."""
        return self.begin_task(name, **fields).result()

    def daemons(self) -> list[int]:
        """Return the ids of the processes that serve the machine's share."""
        processes = self._stack.containerd.nursery.descendants()
        return [process.pid for process in processes if PROGRAMS["virtio-fs daemon"] in process.command]

    def run(self, *command: str) -> None:
        """Create and start the container."""
        self.describe_container(*command)
        rootfs = [{"type": "bind", "source": str(self.rootfs), "options": ["rbind", "rw"]}]
        self.task("Create", bundle=str(self.container_bundle), rootfs=rootfs)
        self.task("Start")

    def create(self, **fields: Any) -> None:
        """Create the sandbox as containerd's CRI does.

        :param fields: of the pod's configuration, beside its name and its resolver.
        """
        usual = {"hostname": "the-pod", "dns_config": DNSConfig(servers=["192.0.2.53"])}
        config = PodSandboxConfig(**{**usual, **fields})
        options = {"type_url": "runtime.v1.PodSandboxConfig", "value": config.SerializeToString()}
        self.sandbox(
            "CreateSandbox",
            bundle_path=str(self._bundle),
            options=options,
            netns_path=str(self.network_namespace),
        )

    def describe_container(self, *command: str) -> None:
        """Write the container's specification as containerd's CRI does, with the namespaces of the pod."""
        pid = self.sandbox("SandboxStatus").pid
        namespaces: list[dict[str, str]] = [{"type": "pid"}, {"type": "mount"}]
        for kind, name in (("network", "net"), ("ipc", "ipc"), ("uts", "uts")):
            namespaces.append({"type": kind, "path": f"/proc/{pid}/ns/{name}"})
        spec = {
            "ociVersion": "1.0.2",
            "process": {"args": command, **PROCESS},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "annotations": {
                "io.kubernetes.cri.sandbox-id": self.id,
                "io.kubernetes.cri.container-type": "container",
            },
            "linux": {"namespaces": namespaces},
        }
        (self.container_bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")

    def _begin(self, service: Any, name: str, *, is_there: bool = False, **fields: Any) -> Any:
        method = service.methods_by_name[name]
        request: type[Message] = GetMessageClass(method.input_type)
        response: type[Message] = GetMessageClass(method.output_type)
        call = self._channel.unary_unary(
            f"/{service.full_name}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call.future(
            request(**fields), timeout=CALL_TIMEOUT_S, wait_for_ready=not is_there, metadata=self._metadata
        )


@pytest.fixture
def pod(one_stack: Stack, tmp_path: Path) -> Iterator[SandboxByHand]:
    """A shim that was started for a sandbox."""
    with SandboxByHand(one_stack, tmp_path) as opened:
        yield opened


def code_of(call: Any) -> grpc.StatusCode:
    """Return how a call ended."""
    error = call.exception(CALL_TIMEOUT_S)
    return grpc.StatusCode.OK if error is None else error.code()


def test_a_sandbox_lives_its_whole_life_by_the_sandbox_service(pod: SandboxByHand) -> None:
    assert code_of(pod.begin("StartSandbox")) is grpc.StatusCode.FAILED_PRECONDITION
    pod.create()
    assert code_of(pod.begin("CreateSandbox")) is grpc.StatusCode.ALREADY_EXISTS
    waiting = pod.begin("WaitSandbox")
    started = pod.sandbox("StartSandbox")
    assert started.created_at.seconds > 0
    network = Path(f"/proc/{started.pid}/ns/net")
    assert network.stat().st_ino == pod.network_namespace.stat().st_ino

    status = pod.sandbox("SandboxStatus", verbose=True)
    assert (status.sandbox_id, status.state, status.pid) == (pod.id, "SANDBOX_READY", started.pid)
    assert json.loads(status.info["info"])["reason"] == ""
    platform = pod.sandbox("Platform").platform
    assert (platform.os, platform.architecture) == ("linux", "amd64")
    pod.sandbox("PingSandbox")
    with stopped(started.pid):
        assert code_of(pod.begin("PingSandbox")) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert code_of(pod._begin(SANDBOX, "PingSandbox", sandbox_id="other")) is grpc.StatusCode.NOT_FOUND

    # A container of which the shim has heard nothing, on a connection that is not the sandbox's.
    assert pod.task("Connect").task_pid == 0
    pod.run("sh", "-c", 'name=$(hostname); echo "$name" > /seen; exec sleep 100000')
    seen = pod.rootfs / "seen"
    until(lambda: seen.exists() and seen.read_text(), what="the container runs")
    assert seen.read_text() == "the-pod\n"
    metric = pod.sandbox("SandboxMetrics").metrics
    measured: Any = {"v1": cgroups_v1_pb2.Metrics(), "v2": cgroups_v2_pb2.Metrics()}[
        metric.data.type_url.split(".")[3]
    ]
    measured.ParseFromString(metric.data.value)
    assert measured.pids.current == 1
    pod.task("Kill", signal=signal.SIGKILL, all=True)
    assert pod.task("Wait").exit_status == 137
    pod.task("Delete")
    pod.task("Shutdown")  # as containerd asks after every container: the sandbox stays
    assert pod.sandbox("SandboxStatus").state == "SANDBOX_READY"
    assert not waiting.done()

    pod.sandbox("StopSandbox", timeout_secs=5)
    assert waiting.result(NOTICED_S).exit_status == 0
    pod.sandbox("StopSandbox")
    status = pod.sandbox("SandboxStatus")
    assert (status.state, status.exited_at.seconds > 0) == ("SANDBOX_NOTREADY", True)
    assert code_of(pod.begin("PingSandbox")) is grpc.StatusCode.UNAVAILABLE
    pod.sandbox("ShutdownSandbox")


def test_a_sandbox_whose_machine_dies_is_not_ready_at_once(pod: SandboxByHand) -> None:
    pod.create()
    waiting = pod.begin("WaitSandbox")
    os.kill(pod.sandbox("StartSandbox").pid, signal.SIGKILL)
    ended = waiting.result(NOTICED_S)
    assert (ended.exit_status, ended.exited_at.seconds > 0) == (137, True)
    status = pod.sandbox("SandboxStatus", verbose=True)
    assert status.state == "SANDBOX_NOTREADY"
    assert "QEMU killed by signal 9" in json.loads(status.info["info"])["reason"]
    pod.sandbox("StopSandbox")
    pod.sandbox("ShutdownSandbox")


def test_a_guest_that_is_slow_to_remove_its_only_container_keeps_its_machine(pod: SandboxByHand) -> None:
    pod.create()
    machine = pod.sandbox("StartSandbox").pid
    pod.run("sleep", "100000")
    pod.task("Kill", signal=signal.SIGKILL, all=True)
    assert pod.task("Wait").exit_status == 137
    with stopped(machine):
        pod.task("Delete")
    pod.sandbox("PingSandbox")
    assert pod.sandbox("SandboxStatus").state == "SANDBOX_READY"
    pod.container = f"{pod.id}-next"
    pod.run("true")
    assert pod.task("Wait").exit_status == 0
    pod.task("Delete")


@pytest.mark.nightly
def test_a_killed_container_that_waits_for_a_slow_host_ends_alone(pod: SandboxByHand) -> None:
    pod.create()
    pod.sandbox("StartSandbox")
    (pod.rootfs / "file").touch()
    pod.run("sh", "-c", "while :; do cat /file; sleep 0.1; done")
    waiting = pod.begin_task("Wait")
    with stopped(*pod.daemons()):
        time.sleep(2)  # the guest's knowledge of the file is valid for a second
        pod.task("Kill", signal=signal.SIGKILL, all=True)
        with pytest.raises(grpc.FutureTimeoutError):
            waiting.result(ALONE_TIMEOUT_S + 1)
    assert waiting.result(NOTICED_S).exit_status == 137
    pod.task("Delete")
    assert pod.sandbox("SandboxStatus").state == "SANDBOX_READY"

"""Pods and their containers, as a kubelet sees them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from tests.cri import image
from tests.cri.client import enum_name
from tests.cri.stack import CGROUP_PARENT
from tests.cri.streams import Stream
from tests.patience import patient
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.cri.stack import Stack

STATE_TIMEOUT_S = patient(120.0)
POD_SCOPE, CONTAINER_SCOPE, NODE_SCOPE = 0, 1, 2
"""The modes of a namespace: the containers of a pod share it, each has its own, or it is the host's."""
SYSCTLS = {"net.ipv4.ip_local_port_range": "30000 40000", "kernel.shm_rmid_forced": "1"}
"""What every pod asks of the kernel: one parameter of its network, and one of its IPC."""
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Output:
    """The result of a command in a container."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a container's log: since when, which stream, whether the line goes on, and its text."""

    time: str
    stream: str
    partial: bool
    text: str


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a pod."""

    pod: Pod
    id: str
    log_path: Path

    def start(self) -> None:
        """Start it."""
        self.pod.stack.cri.call("StartContainer", container_id=self.id)

    def stop(self, *, grace_s: int) -> None:
        """Stop it: SIGTERM, and SIGKILL when the grace is over."""
        self.pod.stack.cri.call("StopContainer", container_id=self.id, timeout=grace_s)

    def remove(self) -> None:
        """Remove it, whether it runs or not."""
        self.pod.stack.cri.call("RemoveContainer", container_id=self.id)

    def status(self) -> Any:
        """Return its status message."""
        return self.pod.stack.cri.call("ContainerStatus", container_id=self.id).status

    def state(self) -> str:
        """Return the name of its state, without the prefix."""
        return enum_name(self.status(), "state").removeprefix("CONTAINER_")

    def wait_for_exit(self, *, timeout_s: float = STATE_TIMEOUT_S) -> int:
        """Wait until it has exited, and return its exit code.

        :raises TimeoutError: if it has not at the deadline.
        """
        deadline = time.monotonic() + timeout_s
        while self.state() != "EXITED":
            if time.monotonic() > deadline:
                raise TimeoutError(f"container {self.id}: is {self.state()}, not EXITED")
            time.sleep(0.05)
        return int(self.status().exit_code)

    def wait_for_line(self, text: str, *, timeout_s: float = STATE_TIMEOUT_S) -> None:
        """Wait until a line of its log is ``text``.

        :raises TimeoutError: if none is at the deadline.
        """
        deadline = time.monotonic() + timeout_s
        while text not in [line.text for line in self.log()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"container {self.id}: no line {text!r} in {self.log()}")
            time.sleep(0.05)

    def log(self) -> list[LogLine]:
        """Return the lines of its log so far, except one that is only partly there."""
        if not self.log_path.exists():
            return []
        written = self.log_path.read_bytes().rpartition(b"\n")[0].decode()
        rows = [line.split(" ", 3) for line in written.split("\n") if line]
        return [LogLine(stamp, stream, tag == "P", text) for stamp, stream, tag, text in rows]

    def whole_log(self) -> list[LogLine]:
        """Return the lines of the log of a container that has ended.

        Containerd may still write the last of them when it says that the container has exited.

        :raises TimeoutError: if it does not close the log in time.
        """
        until(lambda: not self._is_logged(), within_s=STATE_TIMEOUT_S)
        return self.log()

    def _is_logged(self) -> bool:
        """Tell whether containerd has its log open."""
        log = self.log_path.stat()
        for descriptor in Path(f"/proc/{self.pod.stack.containerd.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(descriptor.stat(), log):
                    return True
        return False

    def exec(self, *command: str, timeout_s: int = 100) -> Output:
        """Run a command in it to its end.

        :raises grpc.RpcError: if it takes longer than ``timeout_s``, or cannot be run.
        """
        limit_s = int(patient(timeout_s))
        done = self.pod.stack.cri.call(
            "ExecSync", container_id=self.id, cmd=command, timeout=limit_s, timeout_s=limit_s + patient(100)
        )
        return Output(done.exit_code, done.stdout.decode(), done.stderr.decode())

    def shell(self, script: str, *, timeout_s: int = 100) -> Output:
        """Run a shell script in it to its end."""
        return self.exec("sh", "-c", script, timeout_s=timeout_s)

    def peer(self, verb: str, argument: object, *hosts: str, timeout_s: int = 200) -> list[str]:
        """Run the peer program in it, and return the line that it prints for each host.

        :raises AssertionError: if it fails.
        """
        command = (*image.PEER_COMMAND, verb, str(image.PORT), str(argument), *hosts)
        done = self.exec(*command, timeout_s=timeout_s)
        assert (done.code, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def stream(self, *command: str, **streams: bool) -> Stream:
        """Run a command in it whose streams are carried by a connection.

        :param command: the command; none to attach to the container's own process.
        :param streams: which of ``stdin``, ``stdout``, ``stderr`` and ``tty`` are wanted.
        """
        call = self.pod.stack.cri.call
        if command:
            url = call("Exec", container_id=self.id, cmd=command, **streams).url
        else:
            url = call("Attach", container_id=self.id, **streams).url
        return Stream(url, self.pod.stack.network)


@dataclass(slots=True)
class Pod:
    """A pod that runs, or ran."""

    stack: Stack
    id: str
    config: dict[str, Any]
    attempts: itertools.count[int] = field(default_factory=itertools.count)

    def create(self, name: str, *command: str, **fields: Any) -> Container:
        """Create a container.

        :param name: its name in the pod.
        :param command: its command.
        :param fields: further fields of its configuration.
        """
        attempt = next(self.attempts)
        log_path = f"{name}/{attempt}.log"
        config = {
            "metadata": {"name": name, "attempt": attempt},
            "image": {"image": image.IMAGE},
            "command": command,
            "log_path": log_path,
            "linux": self.linux(),
            **fields,
        }
        log = Path(self.config["log_directory"], log_path)
        log.parent.mkdir(parents=True, exist_ok=True)
        reply = self.stack.cri.call(
            "CreateContainer", pod_sandbox_id=self.id, config=config, sandbox_config=self.config
        )
        return Container(self, reply.container_id, log)

    def linux(self, **security: Any) -> dict[str, Any]:
        """Return the field for a container that shares the namespaces that the pod shares.

        :param security: further fields of its security context.
        """
        namespaces = self.config["linux"]["security_context"]["namespace_options"]
        return {"security_context": {"namespace_options": namespaces, **security}}

    def run(self, name: str, *command: str, **fields: Any) -> Container:
        """Create and start a container."""
        container = self.create(name, *command, **fields)
        container.start()
        return container

    def status(self) -> Any:
        """Return its status message."""
        return self.stack.cri.call("PodSandboxStatus", pod_sandbox_id=self.id).status

    def state(self) -> str:
        """Return the name of its state, without the prefix."""
        return enum_name(self.status(), "state").removeprefix("SANDBOX_")

    def wait_for_state(self, state: str, *, timeout_s: float = STATE_TIMEOUT_S) -> None:
        """Wait until it has a state.

        :raises TimeoutError: if it has another one at the deadline.
        """
        deadline = time.monotonic() + timeout_s
        while (seen := self.state()) != state:
            if time.monotonic() > deadline:
                raise TimeoutError(f"pod {self.id}: is {seen}, not {state}")
            time.sleep(0.05)

    def pid(self) -> int:
        """Return the id of the process that stands for the pod."""
        reply = self.stack.cri.call("PodSandboxStatus", pod_sandbox_id=self.id, verbose=True)
        return int(json.loads(reply.info["info"])["pid"])

    def shim(self) -> int:
        """Return the id of the process of its shim; a copy of it may have yet to become another program."""
        words = (f"-id {self.id}", "-state ")
        found = [
            each
            for each in self.stack.containerd.nursery.descendants()
            if all(word in each.command for word in words)
        ]
        return min(found, key=lambda each: each.start_time).pid

    def addresses(self) -> tuple[str, str]:
        """Return its IPv4 and its IPv6 address."""
        network = self.status().network
        found = [network.ip, *(address.ip for address in network.additional_ips)]
        (four,) = (address for address in found if ":" not in address)
        (six,) = (address for address in found if ":" in address)
        return four, six

    def forward(self, port: int) -> Stream:
        """Open a connection that is forwarded to one of its ports."""
        reply = self.stack.cri.call("PortForward", pod_sandbox_id=self.id, port=[port])
        return Stream(reply.url, self.stack.network)

    def stop(self) -> None:
        """Stop it with its containers."""
        self.stack.cri.call("StopPodSandbox", pod_sandbox_id=self.id)

    def remove(self) -> None:
        """Stop and remove it, as a kubelet does."""
        self.stop()
        self.stack.cri.call("RemovePodSandbox", pod_sandbox_id=self.id)

    def is_known(self) -> bool:
        """Tell whether containerd still knows it."""
        error = self.stack.cri.begin("PodSandboxStatus", pod_sandbox_id=self.id).exception()
        return error is None or error.code() is not grpc.StatusCode.NOT_FOUND


def pod_config(stack: Stack, name: str, *, processes: int = CONTAINER_SCOPE, **linux: Any) -> dict[str, Any]:
    """Return the configuration of a pod.

    :param stack: the stack that will run it.
    :param name: its name, which is its host name, too.
    :param processes: who shares a PID namespace; by default in Kubernetes, no container does.
    :param linux: further fields of its Linux section.
    """
    return {
        "metadata": {"name": name, "uid": str(uuid.uuid4()), "namespace": "tests"},
        "hostname": name,
        "log_directory": str(stack.logs / f"{name}-{os.getpid()}-{next(_numbers)}"),
        "dns_config": {"servers": ["192.0.2.53"], "searches": ["tests.example"], "options": ["ndots:3"]},
        "linux": {
            "cgroup_parent": CGROUP_PARENT,
            # Privileged only in that its containers may be.
            "security_context": {"namespace_options": {"pid": processes}, "privileged": True},
            "sysctls": dict(SYSCTLS),
            **linux,
        },
    }


def run_pod(stack: Stack, name: str, **wanted: Any) -> Pod:
    """Run a pod without containers; its arguments are those of :func:`pod_config`."""
    config = pod_config(stack, name, **wanted)
    reply = stack.cri.call("RunPodSandbox", config=config, runtime_handler=stack.handler)
    return Pod(stack, reply.pod_sandbox_id, config)


def remove_all(pods: Sequence[Pod]) -> None:
    """Remove those pods that containerd still knows."""
    for pod in pods:
        if pod.is_known():
            pod.remove()

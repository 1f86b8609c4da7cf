"""Pods as Kubernetes makes them: a sandbox that stands for the pod, and containers that join its machine."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.containerd import CALL_TIMEOUT_S
from tests.e2e.life import MOMENT_S, until
from tests.e2e.tasks import Exits, Tasks
from tests.e2e.test_death import ENDS_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.e2e.conftest import Stack
    from tests.e2e.containerd import Containerd

pytestmark = [pytest.mark.hako, pytest.mark.timeout(240)]

SANDBOX_ID = "io.kubernetes.cri.sandbox-id"
KIND = "io.kubernetes.cri.container-type"


class Pod:
    """A pod that ``ctr`` makes with the annotations that containerd's CRI sets."""

    def __init__(self, stack: Stack) -> None:
        self.id = new_id()
        self.containerd = stack.containerd
        self.members: list[str] = []
        self._run(self.id, "sandbox", "sleep", "1")

    def add(self, *names: str, share_processes: bool = False) -> None:
        """Run containers in the pod, all at once.

        :param share_processes: join the pod's PID namespace, as Kubernetes calls that of the pod's task.
        """
        self.members += names
        pid = self.containerd.tasks()[self.id][0]
        options = ["--with-ns", f"pid:/proc/{pid}/ns/pid"] if share_processes else []
        started = [
            subprocess.Popen(
                self._argv(name, "container", "sleep", "100000", options=options),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in names
        ]
        for process in started:
            _, problem = process.communicate(timeout=CALL_TIMEOUT_S)
            assert process.returncode == 0, problem

    def remove(self, name: str) -> None:
        """Kill and delete a container."""
        self.containerd.remove(name)
        if name in self.members:
            self.members.remove(name)

    def remove_all(self) -> None:
        """Remove the remains, the sandbox last, as containerd's CRI does."""
        for name in [*self.members, self.id]:
            if name in self.containerd.containers():
                self.containerd.remove(name)

    def run_in(self, name: str, *command: str) -> str:
        """Run a command in a container and return its output."""
        done = self.containerd.exec(name, new_id(), *command)
        assert done.code == 0, done.stderr
        return done.stdout

    def machines(self) -> list[int]:
        """Return the process ids of the machines there are."""
        return [
            process.pid
            for process in self.containerd.nursery.descendants()
            if "qemu-system" in process.command and "setpriv" not in process.command
        ]

    def _run(self, name: str, kind: str, *command: str) -> None:
        made = subprocess.run(
            self._argv(name, kind, *command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CALL_TIMEOUT_S,
            check=False,
        )
        assert made.returncode == 0, made.stderr

    def _argv(self, name: str, kind: str, *command: str, options: Sequence[str] = ()) -> list[str]:
        annotations = [f"{SANDBOX_ID}={self.id}", f"{KIND}={kind}"]
        words = [word for text in annotations for word in ("--annotation", text)]
        return self.containerd.run_argv(IMAGE, name, *command, options=["--detach", *words, *options])


@pytest.fixture
def pod(stack: Stack) -> Iterator[Pod]:
    """A pod without containers; its remains are removed."""
    made = Pod(stack)
    yield made
    made.remove_all()


def status(containerd: Containerd, *names: str) -> list[str]:
    """Return the states of tasks."""
    tasks = containerd.tasks()
    return [tasks.get(name, (0, "GONE"))[1] for name in names]


def test_a_pod_is_one_machine_and_its_containers_come_and_go_independently(pod: Pod) -> None:
    containerd = pod.containerd
    first, second, third, fourth = new_id(), new_id(), new_id(), new_id()
    assert pod.machines() == [containerd.tasks()[pod.id][0]], "the task of a pod lives in its machine"

    pod.add(first, second)  # the sandbox's own command would have ended by now
    assert status(containerd, pod.id, first, second) == ["RUNNING"] * 3
    assert len(pod.machines()) == 1
    show = ["sh", "-c", "for kind in ipc uts net; do readlink /proc/self/ns/$kind; done"]
    assert pod.run_in(first, *show) == pod.run_in(second, *show)

    bare = containerd.exec(pod.id, new_id(), "true")
    assert "runs nothing" in bare.stderr
    assert str(pod.machines()[0]) in containerd.ctr("task", "ps", pod.id).stdout
    measured = containerd.ctr("task", "metrics", pod.id)
    assert measured.code == 0, measured.stderr

    pod.remove(first)
    assert status(containerd, pod.id, first, second) == ["RUNNING", "GONE", "RUNNING"]
    assert pod.run_in(second, "echo", "undisturbed") == "undisturbed\n"
    pod.add(third, fourth, share_processes=True)
    assert pod.run_in(third, "pidof", "sleep").split() == pod.run_in(fourth, "pidof", "sleep").split()
    assert len(pod.run_in(third, "pidof", "sleep").split()) == 2
    pod.remove(third)
    assert len(pod.run_in(fourth, "pidof", "sleep").split()) == 1
    assert pod.run_in(second, "pidof", "sleep") == "1\n"
    assert len(pod.machines()) == 1

    exits = Exits()
    with Tasks(containerd.address) as tasks:
        tasks.subscribe(exits)
        tasks.call("Kill", pod.id, signal=signal.SIGUSR1)
        assert tasks.state(pod.id) == ("RUNNING", 0), "a pause program ignores it"
        tasks.call("Kill", pod.id, signal=signal.SIGTERM)
        assert exits.wait_for(pod.id, timeout_s=MOMENT_S)
        assert tasks.state(pod.id) == ("STOPPED", 0)
    pod.remove(pod.id)
    assert pod.run_in(second, "echo", "still there") == "still there\n"
    pod.remove(second)
    pod.remove(fourth)
    until(lambda: not pod.machines(), what="the machine ends with the last container")
    assert exits.of(pod.id) == [0]


@pytest.mark.mostly_on("2.1-ttrpc")
def test_a_pod_whose_machine_dies_ends_at_once_with_all_its_containers(pod: Pod) -> None:
    containerd = pod.containerd
    names = [new_id(), new_id()]
    pod.add(*names)
    exits = Exits()
    with Tasks(containerd.address) as tasks:
        tasks.subscribe(exits)
        os.kill(pod.machines()[0], signal.SIGKILL)
        for name in (pod.id, *names):
            assert exits.wait_for(name, timeout_s=ENDS_S)
        assert [tasks.state(name) for name in (pod.id, *names)] == [("STOPPED", 137)] * 3
        assert [exits.of(name) for name in (pod.id, *names)] == [[137]] * 3
    refused = containerd.run(
        IMAGE, new_id(), "true", options=["--rm", "--annotation", f"{SANDBOX_ID}={pod.id}"]
    )
    assert "QEMU killed by signal 9" in refused.stderr

"""Pods whose containers end at once, on a busy host: nothing of their last words, files and exits is lost."""

from __future__ import annotations

import contextlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.cri.conftest import counted
from tests.cri.pods import run_pod
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cri.pods import Container, Pod
    from tests.cri.stack import Stack

AT_ONCE = 4
HOGS = 3
TIMEOUT_S = patient(240.0)
COUNTER = "n=0; while :; do n=$((n+1)); echo $n; echo $n >> /data/counted; done"


@contextlib.contextmanager
def busy_host() -> Iterator[None]:
    """Keep the processors busy for a block."""
    with contextlib.ExitStack() as stack:
        for _ in range(HOGS):
            hog = stack.enter_context(subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"]))
            stack.callback(hog.kill)
        yield


def texts(container: Container, stream: str = "stdout") -> list[str]:
    """Return the lines of a stream in the log of a container that has ended."""
    return [line.text for line in container.whole_log() if line.stream == stream]


def live_shortly(stack: Stack, number: int) -> None:
    """Run a pod as a kubelet does, and look at what each of its containers leaves as soon as it has ended."""
    data = stack.containerd.home / f"short-{number}"
    data.mkdir()
    pod = run_pod(stack, f"short-{number}")
    try:
        end_at_once(pod, data)
        be_killed_by_a_probe(pod, data)
        end_with_the_pod(pod, data)
    finally:
        pod.remove()


def run_in(pod: Pod, data: Path, name: str, script: str) -> Container:
    """Run a container with a volume at ``/data``."""
    mounts = [{"container_path": "/data", "host_path": str(data)}]
    return pod.run(name, "sh", "-c", script, mounts=mounts)


def end_at_once(pod: Pod, data: Path) -> None:
    """A container writes, to each stream and to a volume, and has ended."""
    script = "echo first; echo wrong >&2; echo content > /data/file; echo last; exit 3"
    container = run_in(pod, data, "quick", script)
    assert container.wait_for_exit(timeout_s=TIMEOUT_S) == 3
    assert (texts(container), texts(container, "stderr")) == (["first", "last"], ["wrong"])
    assert (data / "file").read_text() == "content\n"
    assert pod.state() == "READY"


def be_killed_by_a_probe(pod: Pod, data: Path) -> None:
    """A container is stopped and started again; the state of the old one stays."""
    script = "trap 'echo bye; echo bye > /data/bye; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    container = run_in(pod, data, "probed", script)
    container.wait_for_line("up", timeout_s=TIMEOUT_S)
    container.stop(grace_s=240)
    assert (container.state(), container.status().exit_code) == ("EXITED", 5)
    assert texts(container) == ["up", "bye"]
    assert (data / "bye").read_text() == "bye\n"
    assert pod.state() == "READY"
    again = run_in(pod, data, "probed", "echo again")
    assert again.wait_for_exit(timeout_s=TIMEOUT_S) == 0
    assert texts(again) == ["again"]
    assert (container.state(), container.status().exit_code) == ("EXITED", 5)


def end_with_the_pod(pod: Pod, data: Path) -> None:
    """A container writes until its pod is stopped: its whole output is kept, and its exit is reported."""
    container = run_in(pod, data, "counter", COUNTER)
    container.wait_for_line("5", timeout_s=TIMEOUT_S)
    pod.stop()
    assert (container.state(), container.status().exit_code) == ("EXITED", 137)
    told, kept = texts(container), (data / "counted").read_text().split()
    assert told == [str(number) for number in range(1, len(told) + 1)]
    assert len(told) - len(kept) in {0, 1}


@pytest.mark.mainly("2.1-shim")
@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.nightly)])
@pytest.mark.timeout(3600)
def test_a_short_pod_on_a_busy_host_loses_nothing(stack: Stack, count: int) -> None:
    with counted(stack), busy_host(), ThreadPoolExecutor(AT_ONCE) as executor:
        for done in [executor.submit(live_shortly, stack, number) for number in range(count)]:
            done.result()

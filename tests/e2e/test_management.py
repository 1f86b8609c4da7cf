"""What operators' tools can ask a running sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.errors import Unavailable
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import _census, new_id
from tests.e2e.life import stopped
from tests.e2e.test_grpc import grpcurl
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.host.state_directory import StartRecord
    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

POD = {"name": "web-0", "namespace": "shop", "uid": "0f3c"}
ANSWER_S = patient(60.0)


@pytest.fixture(scope="module")
def box(one_stack: Stack) -> Iterator[StartRecord]:
    """The sandbox of a container that the tests of this module share."""
    name = new_id()
    annotations = [f"--annotation=io.kubernetes.cri.sandbox-{key}={value}" for key, value in POD.items()]
    with _census(one_stack):
        started = one_stack.containerd.run(IMAGE, name, "sleep", "100000", options=["--detach", *annotations])
        try:
            assert started.code == 0, started.stderr
            yield one_stack.record(name)
        finally:
            one_stack.containerd.remove(name)


def ask(box: StartRecord, method: str, request: Any, reply: type[Any], *, timeout_s: float = ANSWER_S) -> Any:
    return asyncio.run(shims.ask(box, method, request, reply, timeout_s=timeout_s))


def test_a_sandbox_describes_itself(box: StartRecord) -> None:
    found = ask(box, "Describe", api.DescribeRequest(), api.DescribeResponse)

    assert (found.id, found.namespace, found.state, found.reason) == (box.id, box.namespace, "running", "")
    assert {"name": found.pod.name, "namespace": found.pod.namespace, "uid": found.pod.uid} == POD
    assert 0 < time.time() - found.created_at_s < 3600
    assert found.version[0].isdigit()
    assert found.machine.vcpus >= 1
    assert found.machine.memory_bytes >= 128 << 20
    assert found.machine.accelerator in {"kvm", "tcg"}
    assert found.machine.agent_is_hako
    names = [each.name for each in found.processes]
    assert names[0] == "shim"
    assert {"QEMU", "virtio-fs daemon"} <= set(names)
    for process in found.processes:
        os.kill(process.pid, 0)
    [container] = found.containers
    assert (container.id, container.kind, container.state) == (box.id, "guest", "running")
    assert "/proc" in {volume.destination for volume in container.volumes}


def test_a_sandbox_tells_what_it_uses(box: StartRecord) -> None:
    found = ask(box, "Usage", api.UsageRequest(guest_timeout_s=ANSWER_S), api.UsageResponse)

    assert found.problem == ""
    assert all(each.memory_bytes > 1 << 20 for each in found.processes if each.name in {"QEMU", "shim"})
    assert all(each.cpu_s > 0 for each in found.processes if each.name == "QEMU")
    [container] = found.containers
    assert container.id == box.id
    assert container.memory_bytes > 0
    assert container.processes == 1


def test_a_sandbox_tells_the_phases_of_its_start(box: StartRecord) -> None:
    found = ask(box, "Timeline", api.TimelineRequest(), api.TimelineResponse)

    assert found.phases[0].began_s == 0
    assert all(0 <= each.began_s <= each.ended_s for each in found.phases)
    assert {"Create", "Start"} <= {each.name for each in found.phases}


def test_a_sandbox_names_its_log_files(box: StartRecord) -> None:
    found = ask(box, "LogSources", api.LogSourcesRequest(), api.LogSourcesResponse)

    assert {source.kind for source in found.sources} == {"log", "console"}
    texts = {source.kind: shims.Path(source.path).read_text() for source in found.sources}
    assert "boot: sandbox" in texts["log"]


def test_grpcurl_calls_the_management_api(box: StartRecord) -> None:
    path = shims.state_of(box) / "grpc.sock"
    assert shims.SERVICE in grpcurl(path, "list").split()
    assert json.loads(grpcurl(path, f"{shims.SERVICE}/Describe"))["id"] == box.id
    events = grpcurl(path, f"{shims.SERVICE}/Events")
    topics = [json.loads(each)["topic"] for each in events.replace("}\n{", "}\0{").split("\0")]
    assert [topic for topic in topics if topic.startswith("/")] == topics
    assert topics.count("/sandbox/ready") == topics.count("/tasks/start") == 1


def test_nobody_waits_for_a_shim_that_is_stopped(box: StartRecord) -> None:
    found = ask(box, "Describe", api.DescribeRequest(), api.DescribeResponse)
    pid = found.processes[0].pid
    with stopped(pid), pytest.raises(Unavailable, match=f"its shim is stopped; `kill -CONT {pid}`"):
        ask(box, "Describe", api.DescribeRequest(), api.DescribeResponse)

"""The life of a pod: it survives containerd, its death is reported, and its removal leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.cri import image, peer
from tests.cri.client import CALL_TIMEOUT_S, enum_name
from tests.cri.conftest import counted
from tests.cri.image import PORT
from tests.cri.pods import NODE_SCOPE, POD_SCOPE, Pod, pod_config, remove_all, run_pod
from tests.cri.stack import inside
from tests.e2e.life import PROGRAMS, until
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cri.conftest import Duo
    from tests.cri.pods import Container
    from tests.cri.stack import Stack


ATTEMPTS = 5
TEN_S = patient(600.0)
"""How long ten pods may take that are started at once."""


def test_the_runtime_says_that_it_is_ready(stack: Stack) -> None:
    conditions = stack.cri.call("Status").status.conditions
    assert {condition.type: condition.status for condition in conditions}.items() >= {
        "RuntimeReady": True,
        "NetworkReady": True,
    }.items()


def test_the_process_that_stands_for_a_pod_lives_in_its_network(duo: Duo) -> None:
    assert duo.pod.state() == "READY"
    argv = ["/usr/bin/nsenter", f"--net=/proc/{duo.pod.pid()}/ns/net", "/usr/sbin/ip", "-oneline", "address"]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for address in duo.pod.addresses():
        assert f" {address}/" in listed


def test_pods_and_containers_survive_a_restart_of_containerd(duo: Duo) -> None:
    stack, containers = duo.pod.stack, (duo.server, duo.worker, duo.caller)
    before = [(container.state(), container.status().started_at) for container in containers]
    stack.containerd.stop(how=signal.SIGKILL)
    stack.containerd.start()
    stack.cri.wait_until_served()
    assert [(container.state(), container.status().started_at) for container in containers] == before
    assert (duo.pod.state(), duo.neighbour.state()) == ("READY", "READY")
    assert duo.caller.peer("ask", "echo still there", *duo.pod.addresses()) == ["still there"] * 2
    assert duo.worker.shell("exit 9").code == 9
    later = duo.pod.run("later", "sh", "-c", "echo started later")
    assert later.wait_for_exit() == 0
    assert [line.text for line in later.whole_log()] == ["started later"]
    later.remove()


def test_a_pod_whose_machine_dies_is_not_ready_and_can_be_removed_at_once(
    stack: Stack, new_pod: Callable[..., Pod]
) -> None:
    if not stack.is_hako:
        pytest.skip("only the pause container would die")
    pod = new_pod("doomed")
    containers = [pod.run(name, "sleep", "100000") for name in ("one", "two")]
    os.kill(pod.pid(), signal.SIGKILL)
    pod.wait_for_state("NOTREADY")
    assert [container.wait_for_exit() for container in containers] == [137, 137]
    pod.remove()
    assert not pod.is_known()


@pytest.mark.nightly
def test_a_pod_whose_shim_dies_ends_and_leaves_nothing_when_it_is_removed(
    stack: Stack, new_pod: Callable[[str], Pod]
) -> None:
    if not stack.is_hako:
        pytest.skip("the containers would outlive it")
    pod = new_pod("deserted")
    containers = [pod.run(name, "sleep", "100000") for name in ("one", "two")]
    os.kill(pod.shim(), signal.SIGKILL)
    assert all(container.wait_for_exit() in {137, 255} for container in containers)
    pod.remove()
    assert not pod.is_known()


@pytest.mark.mainly
@pytest.mark.parametrize(
    ("guest", "reason"),
    [
        pytest.param('kernel = "/no/kernel"', "/no/kernel", id="without-kernel"),
        pytest.param('kernel_parameters = "rdinit=/none init=/none root=/dev/none"', "panic", id="panics"),
    ],
)
def test_a_pod_that_cannot_start_leaves_nothing(stack: Stack, guest: str, reason: str) -> None:
    if not stack.is_hako:
        pytest.skip("it is Hako's machine that does not start")
    config = Path(stack.containerd.environment["HAKO_CONFIG"])
    good = config.read_text(encoding="utf-8")
    config.write_text(good.replace("[guest]\n", f"[guest]\n{guest}\n"), encoding="utf-8")
    try:
        with counted(stack), pytest.raises(grpc.RpcError, match=reason):
            run_pod(stack, "refused")
    finally:
        config.write_text(good, encoding="utf-8")


@pytest.mark.mainly
def test_a_pod_that_containerd_dies_over_leaves_nothing_when_it_is_removed(stack: Stack) -> None:
    def machines() -> set[int]:
        everything = stack.containerd.nursery.descendants()
        return {each.pid for each in everything if PROGRAMS["QEMU"] in each.command}

    def is_interrupted() -> bool:
        config, others = pod_config(stack, "interrupted"), machines()
        call = stack.cri.begin("RunPodSandbox", config=config, runtime_handler=stack.handler)
        until(lambda: machines() - others, what="its machine starts", timeout_s=CALL_TIMEOUT_S)
        stack.containerd.stop(how=signal.SIGKILL)
        refused = call.exception() is not None
        stack.containerd.start()
        stack.cri.wait_until_served()
        found = [pod for pod in stack.cri.call("ListPodSandbox").items if pod.metadata.name == "interrupted"]
        for pod in found:
            Pod(stack, pod.id, config).remove()
        return refused and all(enum_name(pod, "state") == "SANDBOX_NOTREADY" for pod in found)

    with counted(stack):
        # On a busy host the pod may be complete before the test is on and containerd is killed.
        assert any(is_interrupted() for _ in range(ATTEMPTS))


@pytest.mark.mainly
def test_a_pod_whose_own_task_is_killed_is_not_ready_and_leaves_nothing_when_it_is_removed(
    stack: Stack, new_pod: Callable[..., Pod]
) -> None:
    if stack.kind.sandboxer == "shim":
        pytest.skip("it does not have its own task")
    if not stack.is_hako:
        pytest.skip("runc's shim outlives the pod's own task")
    pod = new_pod("headless")
    container = pod.run("one", "sleep", "100000")
    killed = stack.containerd.ctr("task", "kill", "--signal", "SIGKILL", pod.id)
    assert killed.code == 0, killed.stderr
    pod.wait_for_state("NOTREADY")
    assert container.exec("true").code == 0, "the machine has not ended"
    pod.remove()
    assert not pod.is_known()


@pytest.mark.mainly
def test_a_pod_in_the_hosts_network_is_refused_in_one_line(stack: Stack) -> None:
    if not stack.is_hako:
        pytest.skip("runc's pods can be there")
    if stack.kind.sandboxer == "shim":
        pytest.skip("containerd itself crashes on that before 2.3")
    config = pod_config(stack, "outside")
    config["linux"]["security_context"]["namespace_options"]["network"] = NODE_SCOPE
    with counted(stack), pytest.raises(grpc.RpcError) as caught:
        stack.cri.call("RunPodSandbox", config=config, runtime_handler=stack.handler)
    assert "it asks for the host's network, which a machine cannot see" in str(caught.value.details())
    assert "\n" not in str(caught.value.details())


@pytest.mark.mainly
def test_removing_a_pod_ends_its_running_containers_and_leaves_nothing(
    new_pod: Callable[..., Pod],
) -> None:
    pod = new_pod("removed")
    for name in ("one", "two"):
        pod.run(name, "sh", "-c", "trap '' TERM; while :; do sleep 1; done")
    pod.create("three", "true")
    pod.remove()
    listed = pod.stack.cri.call("ListContainers", filter={"pod_sandbox_id": pod.id}).containers
    assert list(listed) == []
    assert not pod.is_known()
    pod.stack.cri.call("RemovePodSandbox", pod_sandbox_id=pod.id)  # once more, which must succeed


@pytest.mark.mainly
def test_a_stopped_pod_is_not_ready_and_keeps_its_containers_exits(new_pod: Callable[..., Pod]) -> None:
    pod = new_pod("stopped")
    done = pod.run("done", "sh", "-c", "exit 4")
    assert done.wait_for_exit() == 4
    running = pod.run("running", "sleep", "100000")
    pod.stop()
    assert pod.state() == "NOTREADY"
    assert (done.wait_for_exit(), running.wait_for_exit()) == (4, 137)
    pod.stop()  # once more, which must succeed


def wait_for_programs(container: Container, *wanted: str) -> None:
    """Wait until a container sees processes with these command lines."""
    until(
        lambda: set(wanted) <= set(container.exec("ps", "-o", "args").stdout.splitlines()),
        what=f"the container sees {wanted}",
    )


@pytest.mark.mainly
def test_the_containers_of_a_pod_may_share_their_processes(new_pod: Callable[..., Pod]) -> None:
    pod = new_pod("sharing", processes=POD_SCOPE)
    one, two = (pod.run(name, "sleep", seconds) for name, seconds in (("one", "11111"), ("two", "22222")))
    # A container has started before its process has become its program.
    wait_for_programs(one, "sleep 11111", "sleep 22222")
    two.stop(grace_s=0)
    assert "sleep 22222" not in one.exec("ps", "-o", "args").stdout
    three = pod.run("three", "sleep", "33333")
    wait_for_programs(three, "sleep 11111", "sleep 33333")
    one.stop(grace_s=0)
    assert (pod.state(), three.state()) == ("READY", "RUNNING")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_ten_pods_of_two_containers_run_at_once(stack: Stack) -> None:
    with counted(stack):
        configs = [pod_config(stack, f"pod-{number}") for number in range(10)]
        calls = [
            stack.cri.begin("RunPodSandbox", config=config, runtime_handler=stack.handler, timeout_s=TEN_S)
            for config in configs
        ]
        pods = [
            Pod(stack, call.result().pod_sandbox_id, config)
            for call, config in zip(calls, configs, strict=True)
        ]
        try:
            for pod in pods:
                server = pod.run("server", *image.PEER_COMMAND, "serve", str(PORT))
                server.wait_for_line("serving")
            for pod in pods:
                client = pod.run("client", "sleep", "100000")
                assert client.peer("ask", "echo inside", "127.0.0.1") == ["inside"]
            addresses = {address for pod in pods for address in pod.addresses()}
            assert len(addresses) == 20
            with inside(stack.network):
                assert {peer.ask(address, PORT, "echo hello") for address in addresses} == {"hello"}
        finally:
            remove_all(pods)

"""The life of a container in a pod: order, logs, restart, stop, limits, and its view of the others."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.cri.client import CALL_TIMEOUT_S
from tests.cri.pods import SYSCTLS
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cri.conftest import Duo

MIB = 1 << 20
LONG_GRACE_S = 2 * int(CALL_TIMEOUT_S)
"""A call that waits until it is over fails before."""
START_TIME = "22"
"""The field of a process's ``stat`` that never changes, and that no other process of the same id has."""


def test_init_containers_run_one_after_the_other_and_before_the_rest(duo: Duo, tmp_path: Path) -> None:
    volume = [{"container_path": "/shared", "host_path": str(tmp_path)}]
    for name in ("first", "second"):
        init = duo.pod.run(name, "sh", "-c", f"echo {name} >>/shared/order", mounts=volume)
        assert init.wait_for_exit() == 0
        init.remove()
    last = duo.pod.run("last", "cat", "/shared/order", mounts=volume)
    assert last.wait_for_exit() == 0
    assert [line.text for line in last.whole_log()] == ["first", "second"]
    last.remove()


def test_a_log_is_complete_and_says_which_stream_and_when(duo: Duo) -> None:
    long_line = "x" * 40000
    script = f"seq 5000; echo wrong >&2; sleep 0.2; echo {long_line}; printf unfinished"
    before = datetime.now(UTC)
    writer = duo.pod.run("writer", "sh", "-c", script)
    assert writer.wait_for_exit() == 0
    log = writer.whole_log()
    writer.remove()
    output = "".join(line.text + ("" if line.partial else "\n") for line in log if line.stream == "stdout")
    expected = "".join(f"{number}\n" for number in range(1, 5001)) + long_line + "\nunfinished"
    assert output.removesuffix("\n") == expected
    assert [line.text for line in log if line.stream == "stderr"] == ["wrong"]
    times = [datetime.fromisoformat(line.time) for line in log if line.stream == "stdout"]
    assert [before, *times] == sorted([before, *times])
    assert max(len(line.text) for line in log) <= 16384


@pytest.mark.mainly
def test_exit_codes_and_reasons_are_reported(duo: Duo) -> None:
    for code, reason in ((0, "Completed"), (7, "Error")):
        container = duo.pod.run("ending", "sh", "-c", f"sleep 0.3; exit {code}")
        assert container.wait_for_exit() == code
        status = container.status()
        assert status.reason == reason
        assert status.created_at <= status.started_at <= status.finished_at
        container.remove()


@pytest.mark.mainly
def test_a_program_that_does_not_exist_is_refused_by_name(duo: Duo) -> None:
    container = duo.pod.create("nothing", "/no/such/program")
    with pytest.raises(grpc.RpcError) as refused:
        container.start()
    assert "/no/such/program" in str(refused.value.details())
    assert container.state() == "EXITED"
    container.remove()


def test_stopping_sends_sigterm_first_and_waits_for_the_grace(duo: Duo) -> None:
    script = "trap 'echo terminated; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    container = duo.pod.run("graceful", "sh", "-c", script)
    container.wait_for_line("ready")
    container.stop(grace_s=LONG_GRACE_S)
    assert container.wait_for_exit() == 5
    assert container.whole_log()[-1].text == "terminated"
    container.remove()


@pytest.mark.mainly
def test_stopping_kills_what_ignores_sigterm_when_the_grace_is_over(duo: Duo) -> None:
    container = duo.pod.run("stubborn", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
    container.wait_for_line("ready")
    start = time.monotonic()
    container.stop(grace_s=2)
    assert time.monotonic() - start >= 2
    assert container.wait_for_exit() == 137
    container.remove()


def test_restarting_a_container_leaves_the_others_alone(duo: Duo) -> None:
    def lives() -> list[tuple[str, int, str]]:
        return [
            (
                container.state(),
                container.status().started_at,
                container.exec("cut", "-d", " ", "-f", START_TIME, "/proc/1/stat").stdout,
            )
            for container in (duo.server, duo.worker)
        ]

    before = lives()
    for _ in range(2):
        restarted = duo.pod.run("restarted", "sh", "-c", "echo $(hostname) ready; exec sleep 100000")
        restarted.wait_for_line("duo ready")
        restarted.stop(grace_s=0)
        assert restarted.wait_for_exit() == 137
        restarted.remove()
    assert lives() == before


@pytest.mark.mainly
def test_a_container_sees_its_own_processes_only(duo: Duo) -> None:
    def listed() -> str:
        return duo.worker.exec("ps", "-o", "pid,args").stdout

    # A container has started before its process has become its last program.
    until(lambda: "sleep 100000" in listed())
    assert "peer.py" not in listed()


@pytest.mark.mainly
def test_containers_of_a_pod_share_ipc_and_shared_memory(duo: Duo) -> None:
    assert duo.worker.shell("echo note >/dev/shm/from-worker").code == 0
    assert duo.server.exec("cat", "/dev/shm/from-worker").stdout == "note\n"
    links = {container.exec("readlink", "/proc/self/ns/ipc").stdout for container in (duo.server, duo.worker)}
    assert len(links) == 1


def test_containers_have_the_kernel_parameters_of_their_pod(duo: Duo) -> None:
    paths = [f"/proc/sys/{name.replace('.', '/')}" for name in SYSCTLS]
    seen = [" ".join(line.split()) for line in duo.worker.exec("cat", *paths).stdout.splitlines()]
    assert seen == list(SYSCTLS.values())


@pytest.mark.mainly
def test_a_read_only_volume_cannot_be_written(duo: Duo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("given", encoding="utf-8")
    volume = [{"container_path": "/given", "host_path": str(tmp_path), "readonly": True}]
    container = duo.pod.run("reader", "sleep", "100000", mounts=volume)
    assert container.exec("cat", "/given/file").stdout == "given"
    done = container.shell("echo other >/given/file")
    assert done.code != 0
    assert "Read-only file system" in done.stderr
    container.remove()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "given"


@pytest.mark.mainly
def test_a_container_over_its_memory_limit_is_killed_for_it(duo: Duo) -> None:
    hog = duo.pod.run(
        "hog",
        "sh",
        "-c",
        "tail /dev/zero",
        linux={"resources": {"memory_limit_in_bytes": 32 * MIB}},
    )
    assert hog.wait_for_exit() == 137
    until(lambda: hog.status().reason == "OOMKilled")
    hog.remove()
    assert duo.worker.state() == "RUNNING"


@pytest.mark.mainly
def test_the_limits_of_a_running_container_can_be_changed(duo: Duo) -> None:
    container = duo.pod.run(
        "limited", "sleep", "100000", linux={"resources": {"memory_limit_in_bytes": 64 * MIB}}
    )
    duo.pod.stack.cri.call(
        "UpdateContainerResources",
        container_id=container.id,
        linux={"memory_limit_in_bytes": 96 * MIB},
    )
    limit = container.shell(
        "cat /sys/fs/cgroup/memory.max || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
    )
    assert limit.stdout == f"{96 * MIB}\n"
    container.remove()

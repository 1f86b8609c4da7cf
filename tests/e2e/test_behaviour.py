"""Behaviour of runc's shim that containerd's clients have come to rely on."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import grpc
import pytest

from shim.sandbox.containers import DESERTED_S
from tests.e2e.busybox import IMAGE
from tests.e2e.by_hand import ByHand
from tests.e2e.conftest import new_id
from tests.e2e.life import until
from tests.e2e.tasks import Exits, Tasks
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

END_S = patient(60.0)
LONGEST_NAMESPACE = "n" * 76  # containerd's identifiers are no longer


@pytest.fixture
def box(one_stack: Stack) -> Iterator[str]:
    name = new_id()
    yield name
    if name in one_stack.containerd.containers():
        one_stack.containerd.remove(name)


def test_a_container_can_be_started_again_after_its_task_was_deleted(one_stack: Stack, box: str) -> None:
    containerd = one_stack.containerd
    assert containerd.run(IMAGE, box, "sleep", "1000", options=["--detach"]).code == 0
    for _ in range(2):
        assert containerd.exec(box, "touch", "touch", "/seen").code == 0
        assert containerd.ctr("task", "kill", "--signal", "9", box).code == 0
        containerd.wait_for_state(box, "STOPPED")
        containerd.ctr("task", "delete", box)
        again = containerd.ctr("task", "start", "--detach", box)
        assert again.code == 0, again.stderr
        assert containerd.exec(box, "look", "ls", "/seen").stdout == "/seen\n"


def test_the_exit_of_a_task_is_reported_once_and_none_of_a_task_that_could_not_be_created(
    one_stack: Stack, box: str, tmp_path: Path
) -> None:
    containerd = one_stack.containerd
    made = containerd.ctr("container", "create", "--runtime", containerd.runtime, IMAGE, box, "/missing")
    assert made.code == 0, made.stderr
    exits = Exits()
    with Tasks(containerd.address) as tasks:
        tasks.subscribe(exits)
        with pytest.raises(grpc.RpcError, match="/missing"):
            tasks.begin_create(box).result()
        ended = containerd.run(IMAGE, later := new_id(), "sh", "-c", "sleep 1000 & exit 3")
        assert ended.code == 3, ended.stderr
        assert exits.wait_for(later, timeout_s=END_S)
        # containerd sends on what it is told in order: had there been more, it would have come before this.
        assert containerd.run(IMAGE, last := new_id(), "true").code == 0
        assert exits.wait_for(last, timeout_s=END_S)
        assert exits.seen == [(later, 3), (last, 0)]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        pytest.param("/missing", "no such file or directory", id="no file"),
        pytest.param("missing", "executable file not found in $PATH", id="not in PATH"),
        pytest.param("/etc/passwd", "permission denied", id="no program"),
        pytest.param("/etc", "permission denied", id="no file of any kind"),
    ],
)
def test_the_error_for_a_missing_program_has_the_words_that_clients_look_for(
    one_stack: Stack, box: str, program: str, words: str
) -> None:
    # Docker's command makes its exit status of them: 127 and 126.
    containerd = one_stack.containerd
    assert containerd.run(IMAGE, box, "sleep", "1000", options=["--detach"]).code == 0

    for refused in (containerd.exec(box, "exec", program), containerd.run(IMAGE, new_id(), program)):
        assert refused.code != 0
        assert words in refused.stderr


def test_a_container_that_names_no_host_has_the_name_of_the_host(one_stack: Stack) -> None:
    result = one_stack.containerd.run(IMAGE, new_id(), "hostname")

    assert (result.code, result.stdout.strip()) == (0, socket.gethostname())


def test_a_mounted_file_that_is_rewritten_before_the_start_is_read_whole(
    one_stack: Stack, box: str, tmp_path: Path
) -> None:
    # As Docker does with /etc/resolv.conf, and hooks with /etc/hosts.
    containerd, shared, output = one_stack.containerd, tmp_path / "shared", tmp_path / "output"
    shared.write_text("before")
    mount = f"type=bind,src={shared},dst=/shared,options=rbind:ro"
    made = containerd.ctr(
        "container", "create", "--runtime", containerd.runtime, "--mount", mount, IMAGE, box, "cat", "/shared"
    )
    assert made.code == 0, made.stderr

    with Tasks(containerd.address) as tasks:
        tasks.begin_create(box, stdout=f"file://{output}").result()
        shared.write_text("after, and longer")
        tasks.call("Start", box)
        tasks.call("Wait", box)

    assert output.read_text() == "after, and longer"


def test_an_exec_ends_although_a_child_it_left_behind_holds_its_output(one_stack: Stack, box: str) -> None:
    containerd = one_stack.containerd
    assert containerd.run(IMAGE, box, "sleep", "1000", options=["--detach"]).code == 0

    result = containerd.exec(box, "parent", "sh", "-c", "sleep 1000 & echo done; exit 3")

    assert (result.code, result.stdout) == (3, "done\n")


def test_output_goes_on_to_the_same_log_after_a_restart_of_containerd(
    one_stack: Stack, box: str, tmp_path: Path
) -> None:
    containerd = one_stack.containerd
    log = tmp_path / "box.log"
    script = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done"
    started = containerd.run(
        IMAGE, box, "sh", "-c", script, options=["--detach", "--log-uri", f"file://{log}"]
    )
    assert started.code == 0, started.stderr

    def lines() -> list[str]:
        return log.read_text().split("\n")[:-1] if log.exists() else []  # the last may be unfinished

    until(lines, what="output in the log")

    containerd.stop()
    before = len(lines())
    until(lambda: len(lines()) > before + 1, what="output while containerd is away")
    containerd.start()
    after = len(lines())
    until(lambda: len(lines()) > after + 1, what="output after the restart")

    seen = lines()
    assert seen == [str(number) for number in range(1, len(seen) + 1)]


def test_a_container_lives_in_a_namespace_of_the_longest_name(
    one_stack: Stack, image_archive: Path, request: pytest.FixtureRequest
) -> None:
    containerd = one_stack.containerd

    def ctr(*arguments: str | Path) -> str:
        result = containerd.ctr("--namespace", LONGEST_NAMESPACE, *arguments)
        assert result.code == 0, result.stderr
        return result.stdout

    def forget() -> None:
        ctr("images", "remove", "--sync", IMAGE)
        containerd.ctr("namespaces", "remove", LONGEST_NAMESPACE)

    ctr("images", "import", image_archive)
    request.addfinalizer(forget)
    box = "b" * 76

    assert ctr("run", "--rm", "--runtime", containerd.runtime, IMAGE, box, "echo", "here") == "here\n"


def test_a_shim_ends_by_itself_after_its_last_container(one_stack: Stack, tmp_path: Path) -> None:
    # As after the death of a containerd between Delete and Shutdown: 1.6 does not take it up again.
    with ByHand(one_stack, tmp_path) as box:
        box.call("Kill", signal=9)
        box.call("Wait")
        box.call("Delete")
        processes = one_stack.containerd.nursery.descendants
        until(
            lambda: not any(box.id in each.command for each in processes()),
            what="the shim and its machine end",
            timeout_s=DESERTED_S + END_S,
        )

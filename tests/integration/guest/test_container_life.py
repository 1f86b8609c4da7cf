"""A whole container life in the real image."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from proto.kata import oci_pb2
from tests.integration.guest.agent_client import StatusError
from tests.integration.guest.guest_machine import process, spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.guest.conftest import Life


def test_output_and_exit_code(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("sh", "-c", "echo out; echo err >&2; exit 42")
    assert container.read_all() == b"out\n"
    assert container.read_all("ReadStderr") == b"err\n"
    assert container.wait() == 42


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 1", 1), ("kill -9 $$; sleep 9", 137)])
def test_exit_status(new_container: Callable[[], Life], script: str, status: int) -> None:
    container = new_container()
    # A nested shell, because a PID namespace's init ignores signals from inside.
    container.run("sh", "-c", f"sh -c '{script}'; exit $?")
    assert container.wait() == status


def test_input_reaches_the_process_and_its_end_ends_it(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat")
    container.write(b"hello\n")
    assert container.read() == b"hello\n"
    container.close_stdin()
    assert container.read_all() == b""
    assert container.wait() == 0


def test_empty_input_closes_it(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat")
    container.write(b"")
    assert container.wait() == 0


def test_terminal_has_a_size_and_merges_outputs(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.create("sh", terminal=True)
    container.resize(33, 77)
    container.start()
    container.write(b"stty size; echo error >&2\n")
    seen = container.read_until(b"error\r\n")
    assert b"33 77\r\n" in seen
    container.resize(44, 99)
    container.write(b"stty size; exit 3\n")
    assert b"44 99\r\n" in container.read_all()
    assert container.wait() == 3


def test_resize_without_a_terminal_is_refused(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat")
    with pytest.raises(StatusError, match="no tty") as refused:
        container.resize(1, 1)
    assert refused.value.code == 14


@pytest.mark.parametrize("terminal", [False, True])
def test_missing_executable_fails_create_and_names_it(
    new_container: Callable[[], Life], *, terminal: bool
) -> None:
    container = new_container()
    with pytest.raises(StatusError, match="no-such-program") as refused:
        container.create("no-such-program", terminal=terminal)
    assert "\n" not in refused.value.message
    # Nothing is left of it: the same id can be used at once.
    container.run("sh", "-c", "exit 7")
    assert container.wait() == 7


@pytest.mark.parametrize("terminal", [False, True])
def test_missing_executable_fails_exec_and_names_it(
    new_container: Callable[[], Life], *, terminal: bool
) -> None:
    container = new_container()
    container.run("cat")
    with pytest.raises(StatusError, match="no-such-program") as refused:
        container.execute("e1", "no-such-program", terminal=terminal)
    assert "\n" not in refused.value.message
    container.execute("e1", "sh", "-c", "exit 5")
    assert container.wait("e1") == 5


def test_exec_has_its_own_streams_and_status(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat")
    container.execute("e1", "sh", "-c", "cat; echo done >&2; exit 9")
    container.write(b"for exec\n", "e1")
    container.close_stdin("e1")
    assert container.read_all(exec_id="e1") == b"for exec\n"
    assert container.read_all("ReadStderr", exec_id="e1") == b"done\n"
    assert container.wait("e1") == 9
    with pytest.raises(StatusError) as gone:
        container.wait("e1")
    assert gone.value.code == 5


def test_exec_on_a_terminal(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat")
    container.execute("e1", "sh", terminal=True)
    container.resize(20, 60, "e1")
    container.write(b"stty size; exit 4\n", "e1")
    assert b"20 60\r\n" in container.read_all(exec_id="e1")
    assert container.wait("e1") == 4


def test_signals(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("sh", "-c", "trap 'exit 12' TERM; echo ready; while :; do sleep 0.1; done")
    assert container.read() == b"ready\n"
    container.execute("e1", "sleep", "100")
    container.signal(10, "e1")
    assert container.wait("e1") == 138
    container.signal(15)
    assert container.wait() == 12
    assert container.wait() == 12
    container.signal(9)


def test_kill_reaches_every_process(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("sleep", "100")
    container.execute("e1", "sleep", "100")
    container.signal(9)
    assert container.wait() == 137
    assert container.wait("e1") == 137


def test_kill_before_start(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.create("sleep", "100")
    container.signal(9)
    assert container.wait() == 137


def test_output_before_the_end_is_whole(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("dd", "if=/dev/zero", "bs=1M", "count=20")
    digest = hashlib.sha256(container.read_all(length=1 << 20)).hexdigest()
    assert digest == hashlib.sha256(bytes(20 << 20)).hexdigest()
    assert container.wait() == 0


def test_background_child_does_not_hold_the_output_open(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat")
    container.execute("e1", "sh", "-c", "sleep 1000 & echo last")
    # An answer that waited for the child would come after the client has given up.
    assert container.read_all(exec_id="e1") == b"last\n"
    assert container.wait("e1") == 0


def test_process_is_as_specified(new_container: Callable[[], Life]) -> None:
    container = new_container()
    report = (
        "id; pwd; ulimit -n; echo $GREETING; hostname; cat /proc/self/oom_score_adj /proc/self/cgroup; "
        "echo $$; grep -E 'CapEff|NoNewPrivs' /proc/self/status; "
        "echo x > /proc/sys/kernel/hostname || echo readonly"
    )
    whole = spec(
        container.id,
        process(
            "sh",
            "-c",
            report,
            NoNewPrivileges=True,
            OOMScoreAdj=123,
            Rlimits=[oci_pb2.POSIXRlimit(Type="RLIMIT_NOFILE", Hard=512, Soft=256)],
        ),
    )
    whole.Process.Cwd = "/tmp"
    whole.Process.Env.append('GREETING=h\u00e9 "quoted" \\ end')
    whole.Process.User.CopyFrom(oci_pb2.User(UID=1000, GID=1001, AdditionalGids=[5, 6]))
    container.create_from(whole)
    container.start()
    assert container.read_all().decode().splitlines() == [
        "uid=1000 gid=1001 groups=5,6",
        "/tmp",
        "256",
        'h\u00e9 "quoted" \\ end',
        "the-pod",
        "123",
        "0::/",
        "1",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
        "readonly",
    ]
    assert container.wait() == 0


def test_containers_share_a_pid_namespace_if_asked(new_container: Callable[[], Life]) -> None:
    first, second, third = new_container(), new_container(), new_container()
    show = ("sh", "-c", "for n in pid ipc uts; do readlink /proc/self/ns/$n; done; echo $$; cat")
    for container, shares in ((first, True), (second, True), (third, False)):
        container.create_from(spec(container.id, process(*show)), sandbox_pidns=shares)
        container.start()
    seen = [container.read_lines(4) for container in (first, second, third)]
    assert seen[0][0] == seen[1][0] != seen[2][0]
    assert seen[0][3] != "1" != seen[1][3]
    assert seen[2][3] == "1"
    assert seen[0][1:3] == seen[1][1:3] == seen[2][1:3]
    # Process 1 belongs to no container: it outlives the first, takes over orphans, and leads nowhere.
    first.execute("orphan", "sh", "-c", "(sleep 0.1; exit 7) & echo $!; sleep 1000 & echo $! .")
    brief, orphan, _end = first.read_until(b".\n", "orphan").decode().split()
    script = (
        "cat /proc/1/comm; ls /proc/1/root/; cat /proc/1/environ;"
        "grep -E '^(State|Uid|CapEff|PPid)' /proc/1/status;"
        f"until grep '^PPid:.1$' /proc/{orphan}/status; do sleep 0.1; done;"
        # One that is not waited for stays there as a zombie.
        f"while test -e /proc/{brief}; do sleep 0.1; done"
    )
    second.execute("look", "sh", "-c", script)
    assert second.read_all(exec_id="look").decode().split("\n") == [
        "pause",
        "State:\tS (sleeping)",
        "PPid:\t0",
        "Uid:\t65534\t65534\t65534\t65534",
        "CapEff:\t0000000000000000",
        "PPid:\t1",
        "",
    ]
    denied = second.read_all("ReadStderr", "look").decode()
    assert denied.count("Permission denied") == 2
    # What init leaves behind ends with it, though the namespace goes on.
    first.close_stdin()
    assert first.wait() == 0
    assert first.read_all(exec_id="orphan") == b""
    first.remove()
    second.execute("after", "sh", "-c", f"while test -e /proc/{orphan}; do sleep 0.1; done")
    assert second.wait("after") == 0

"""A shim that the zygote forks equals one started anew, and outlives the zygote."""

from __future__ import annotations

import json
import marshal
import os
import resource
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim import zygote_protocol
from shim.bootstrap import zygote
from shim.host import host_process
from tests.unit.shim.bootstrap.test_start import fake_containerd
from tests.unit.shim.conftest import WITHIN_S, end, identity_of, lock_holder, parent, place, zygote_socket
from tests.waiting import until

if TYPE_CHECKING:
    from tests.unit.shim.conftest import Containerd


def is_shim(pid: int) -> bool:
    """Whether a process is a sandbox's shim by its command line, or is just ending."""
    try:
        return "-state" in Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def only_spare(containerd: Containerd) -> int:
    """Wait until the zygote has one child that is not a shim, its spare; return its pid."""
    pid = lock_holder(zygote_socket(containerd))

    def spares() -> list[int]:
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [child for child in children if not is_shim(child)]

    return until(lambda: found if len(found := spares()) == 1 else [])[0]


def test_a_forked_shim_equals_one_started_anew(warmed: Containerd) -> None:
    anew = warmed.daemon("c1")
    warmed.make_bundle("c2")
    assert warmed.run("start", "c2").returncode == 0
    forked = warmed.daemon("c2")

    assert parent(forked["pid"]) == lock_holder(place(warmed)) != parent(anew["pid"])
    assert forked["session"] == forked["pid"]
    assert forked["command"] == anew["command"]
    assert forked["oom_score_adj"] == anew["oom_score_adj"]
    own = dict.fromkeys(("PWD", "PYTEST_CURRENT_TEST"))
    assert {**forked["environment"], **own} == {**anew["environment"], **own}
    assert forked["descriptors"].keys() == anew["descriptors"].keys()
    assert forked["descriptors"]["2"] == str(warmed.bundle("c2") / "log")


def test_process_lists_show_the_sandbox_of_a_forked_shim(warmed: Containerd) -> None:
    warmed.make_bundle("c2")
    warmed.run("start", "c2")
    arguments = [each for each in warmed.daemon("c2")["arguments"] if each]
    assert arguments[arguments.index("-id") + 1] == "c2"
    assert "-zygote" not in arguments


def test_shims_survive_the_zygote_and_the_next_start_works(warmed: Containerd) -> None:
    warmed.make_bundle("c2")
    warmed.run("start", "c2")
    forked = warmed.daemon("c2")
    socket_path = zygote_socket(warmed)
    end(lock_holder(socket_path))
    assert Path(f"/proc/{forked['pid']}").exists()

    warmed.make_bundle("c3")
    assert warmed.run("start", "c3").returncode == 0
    assert warmed.daemon("c3")["pid"] != forked["pid"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        # The next zygote, which that start has left behind.
        until(lambda: probe.connect_ex(str(socket_path)) == 0)
    end(lock_holder(socket_path))


def test_only_one_zygote_starts(warmed: Containerd) -> None:
    first = lock_holder(zygote_socket(warmed))
    zygote_socket(warmed).unlink()  # as if it were not ready yet
    warmed.make_bundle("c2")
    assert warmed.run("start", "c2").returncode == 0
    assert lock_holder(place(warmed)) == first


def test_the_zygote_survives_malformed_requests(warmed: Containerd) -> None:
    for message in (b"", b"{", b'{"unknown": 1}', b"[1]", b"\xff"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(zygote_socket(warmed)))
            client.send(message)
    before = lock_holder(zygote_socket(warmed))
    warmed.make_bundle("c2")
    assert warmed.run("start", "c2").returncode == 0
    assert parent(warmed.daemon("c2")["pid"]) == before


def test_the_socket_is_for_its_owner_only(warmed: Containerd) -> None:
    assert zygote_socket(warmed).stat().st_mode & 0o777 == 0o600
    assert zygote_socket(warmed).parent.stat().st_mode & 0o777 == 0o700


def test_a_changed_program_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "module.py"
    file.touch()
    known = {str(file): file.stat().st_mtime_ns}
    assert zygote._unchanged(known)
    os.utime(file, ns=(1, 1))
    assert not zygote._unchanged(known)
    file.unlink()
    assert not zygote._unchanged(known)


def test_a_container_joins_the_shim_of_its_group(warmed: Containerd) -> None:
    warmed.make_bundle("c2", annotations={"io.kubernetes.cri.sandbox-id": "c1"})
    reply = warmed.run("start", "c2")
    assert (reply.returncode, reply.stderr) == (0, b"")
    assert json.loads(reply.stdout)["address"] == warmed.bundle("c1").joinpath("address").read_text()
    assert len(warmed.shims()) == 1


def test_a_forked_shim_can_speak_grpc(warmed: Containerd) -> None:
    warmed.configure(f'[shim]\nstate_dir = "{warmed.state_dir}"\nprotocol = "grpc"\n')
    warmed.make_bundle("c2")
    binary = fake_containerd(warmed.directory, "github.com/containerd/containerd", "1.7.24")
    reply = warmed.run("start", "c2", publish_binary=binary)
    assert (reply.returncode, reply.stderr) == (0, b"")
    assert json.loads(reply.stdout)["protocol"] == "grpc"
    assert "-zygote" not in warmed.daemon("c2")["arguments"]


def test_a_refusal_reads_the_same_with_and_without_a_zygote(warmed: Containerd) -> None:
    warmed.make_bundle("c2")
    (warmed.bundle("c2") / "config.json").write_text("{")
    reply = warmed.run("start", "c2")
    assert (reply.returncode, reply.stdout) == (1, b"")
    assert b"config.json: not JSON" in reply.stderr


def test_a_delete_through_the_zygote_leaves_nothing(warmed: Containerd) -> None:
    warmed.make_bundle("c2")
    warmed.run("start", "c2")
    warmed.kill_shims()
    spare = only_spare(warmed)
    taken = host_process.identify(spare)
    reply = warmed.run("delete", "c2")
    assert (reply.returncode, reply.stderr) == (0, b"")
    assert host_process.end([taken], number=None, timeout_s=WITHIN_S) == []
    assert not warmed.state_of("c2").exists()
    assert not warmed.socket_path("c2").exists()


def test_without_a_zygote_in_the_configuration_a_shim_is_started_anew(warmed: Containerd) -> None:
    warmed.configure(f'[shim]\nzygote = false\nstate_dir = "{warmed.state_dir}"\n')
    warmed.make_bundle("c2")
    assert warmed.run("start", "c2").returncode == 0
    assert parent(warmed.daemon("c2")["pid"]) != lock_holder(place(warmed))


@pytest.mark.parametrize("what", ["limits", "umask", "identity"])
def test_a_zygote_refuses_a_caller_with_other_attributes(warmed: Containerd, what: str) -> None:
    zygote_socket(warmed)
    arguments = ["-address", warmed.address, "start"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(place(warmed)))
        umask = os.umask(0o077 if what == "umask" else 0o022)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - (what == "limits"), hard))
        try:
            identity = "" if what == "identity" else identity_of(warmed)
            client.send(marshal.dumps((identity, os.getppid(), "/", arguments, {}, b"", 0.0)))
            assert client.recv(1) == zygote_protocol.REFUSED
        finally:
            os.umask(umask)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hanging_zygote_is_not_waited_for(warmed: Containerd) -> None:
    spare = only_spare(warmed)
    os.kill(spare, signal.SIGSTOP)
    try:
        del warmed.environment["STUB_ACCEPTED_WITHIN_S"]
        warmed.make_bundle("c2")
        assert warmed.run("start", "c2").returncode == 0
        assert parent(warmed.daemon("c2")["pid"]) != lock_holder(place(warmed))
    finally:
        os.kill(spare, signal.SIGCONT)
    # The caller has given up on its request.
    assert len(warmed.shims()) == 2


def ask_for_a_start(containerd: Containerd, client: socket.socket, name: str) -> None:
    """Ask the zygote for a start as a process does that containerd has started, and see it accepted."""
    bundle = containerd.make_bundle(name)
    flags = ["-namespace", "tests", "-address", containerd.address, "-id", name, "start"]
    environment = {**os.environ, **containerd.environment}
    client.connect(str(place(containerd)))
    coded = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
    client.send(marshal.dumps((identity_of(containerd), os.getppid(), str(bundle), flags, coded, b"", 0.0)))
    assert client.recv(1) == zygote_protocol.ACCEPTED


def test_a_start_that_is_killed_leaves_nothing(warmed: Containerd) -> None:
    starting = host_process.identify(only_spare(warmed))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        ask_for_a_start(warmed, client, "c2")
    assert host_process.end([starting], number=None, timeout_s=WITHIN_S) == []
    assert not warmed.state_of("c2").exists()
    assert not warmed.socket_path("c2").exists()


def test_a_shim_that_containerd_never_learns_of_ends(warmed: Containerd) -> None:
    zygote_socket(warmed)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        ask_for_a_start(warmed, client, "c2")
        assert client.recv(zygote_protocol.MAX_ANSWER).startswith(b"\0{")
        assert warmed.state_of("c2").exists()
    until(lambda: not warmed.state_of("c2").exists() and not warmed.socket_path("c2").exists())


def test_a_spare_dies_with_its_zygote(warmed: Containerd) -> None:
    spare = only_spare(warmed)
    identity = host_process.identify(spare)
    end(lock_holder(place(warmed)))
    assert host_process.end([identity], number=None, timeout_s=WITHIN_S) == []

"""``delete`` as containerd runs it: the shim may run, hang, be dead or never have started."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto.containerd import task_v2_pb2
from shim.host import host_process
from shim.host.ledger import Ledger
from shim.telemetry import postmortem
from shim.telemetry.journal import Journal
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from tests.unit.shim.conftest import Containerd


GROUP = "io.kubernetes.cri.sandbox-id"


def delete(containerd: Containerd, container: str = "c1") -> task_v2_pb2.DeleteResponse:
    reply = containerd.run("delete", container)
    assert (reply.returncode, reply.stderr) == (0, b"")
    return task_v2_pb2.DeleteResponse.FromString(reply.stdout)


def nothing_is_left(containerd: Containerd) -> bool:
    return not any(containerd.state_dir.iterdir()) and not containerd.socket_path("c1").exists()


def test_the_reply_reports_a_kill_at_this_moment(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    before = time.time()
    response = delete(containerd)
    assert (response.pid, response.exit_status) == (0, 137)
    assert before - 1 <= response.exited_at.seconds + response.exited_at.nanos / 1e9 <= time.time()


def test_a_dead_shim_leaves_nothing(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    containerd.kill_shims()
    delete(containerd)
    assert nothing_is_left(containerd)


def counted(containerd: Containerd) -> list[tuple[str, str]]:
    """What a monitor reads of failures: phases and causes."""
    entries = Journal(Path(containerd.environment["STUB_LOG_DIR"])).read()
    return [(each["phase"], each["cause"]) for each in entries]


def test_a_shim_that_died_is_counted_once(containerd: Containerd) -> None:
    for name in ("pod", "member"):
        containerd.make_bundle(name, annotations={GROUP: "pod"})
        containerd.run("start", name)
    containerd.kill_shims()
    (containerd.state_of("pod") / "shim.log").write_text("the last line\n", encoding="utf-8")
    for name in ("pod", "member", "pod"):
        delete(containerd, name)
    assert counted(containerd) == [("shim", "Died")]
    kept = postmortem.read(Path(containerd.environment["STUB_LOG_DIR"]), sandbox_id="pod")
    first, *others = kept.splitlines()
    assert first.endswith("Z its shim died; the kernel's log says whether memory was short")
    assert others == ["log: the last line"]


def test_a_shim_that_containerd_ends_is_not_counted(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    delete(containerd)
    assert counted(containerd) == []


def test_everything_is_undone_even_if_the_bundle_is_gone(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    containerd.kill_shims()

    reply = containerd.delete_without_bundle("c1")

    assert (reply.returncode, reply.stderr) == (0, b"")
    assert nothing_is_left(containerd)


def test_a_container_of_a_pod_is_found_without_its_bundle(containerd: Containerd) -> None:
    containerd.make_bundle("pod")
    bundle = containerd.make_bundle("c1")
    (bundle / "config.json").write_text(json.dumps({"annotations": {GROUP: "pod"}}))
    containerd.run("start", "pod")
    containerd.run("start", "c1")

    containerd.delete_without_bundle("c1")

    ledger = Ledger(str(containerd.state_of("pod")))
    assert list(ledger.containers()) == ["pod"]
    ledger.close()


def hooked(containerd: Containerd, text: str) -> Path:
    """A bundle with a hook that runs after the container's end."""
    bundle = containerd.make_bundle("c1")
    hook = {"path": "/bin/sh", "args": ["sh", "-c", text]}
    (bundle / "config.json").write_text(json.dumps({"hooks": {"poststop": [hook]}}))
    return bundle


def processes_in(directory: Path) -> list[str]:
    """The processes that work in a directory; a hook works in its bundle."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # ended, or another user's
            if link.readlink() == directory:
                found.append(link.parent.name)
    return found


def test_poststop_hooks_of_a_dead_shims_container_run_once(containerd: Containerd) -> None:
    bundle = hooked(containerd, "cat >> told")
    containerd.run("start", "c1")
    containerd.kill_shims()
    delete(containerd)
    delete(containerd)
    told = json.loads((bundle / "told").read_text())
    assert (told["id"], told["status"], told["bundle"]) == ("c1", "stopped", str(bundle))


def test_poststop_hooks_that_the_shim_ran_are_not_repeated(containerd: Containerd) -> None:
    bundle = hooked(containerd, "touch ran")
    containerd.run("start", "c1")
    ledger = Ledger(str(containerd.state_of("c1")))
    ledger.deleted("c1")
    ledger.close()
    delete(containerd)
    assert not (bundle / "ran").exists()


def test_a_slow_poststop_hook_is_killed_by_delete(containerd: Containerd) -> None:
    bundle = hooked(containerd, "exec sleep 1000")
    containerd.run("start", "c1")
    containerd.kill_shims()
    delete(containerd)  # takes up to WITHIN_S
    assert processes_in(bundle) == []
    assert nothing_is_left(containerd)


def test_a_second_delete_is_harmless(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    delete(containerd)
    delete(containerd)
    assert nothing_is_left(containerd)


def test_an_idle_shim_ends(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    [shim] = containerd.shims()
    delete(containerd)
    assert not host_process.is_running(shim)
    assert nothing_is_left(containerd)


def test_a_hanging_shim_is_killed(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.environment["STUB_HANGS"] = "1"
    containerd.run("start", "c1")
    containerd.daemon("c1")
    [shim] = containerd.shims()
    delete(containerd)
    assert not host_process.is_running(shim)
    assert nothing_is_left(containerd)


def test_the_children_of_a_dead_shim_are_killed(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    with subprocess.Popen(["/bin/sleep", "600"]) as child:
        ledger = Ledger(str(containerd.state_of("c1")))
        ledger.process(child.pid, name="qemu")
        ledger.close()
        containerd.kill_shims()
        delete(containerd)
        assert child.wait(timeout=WITHIN_S) == -9


def test_a_shim_with_other_containers_keeps_running(containerd: Containerd) -> None:
    for container in ("pod", "member"):
        containerd.make_bundle(container, annotations={GROUP: "pod"})
        containerd.run("start", container)
    ledger = Ledger(str(containerd.state_of("pod")))
    ledger.created("pod")
    ledger.created("member")
    [shim] = containerd.shims()
    delete(containerd, "member")
    assert host_process.is_running(shim)
    delete(containerd, "pod")
    assert not host_process.is_running(shim)
    assert not containerd.state_of("pod").exists()


def test_a_shim_outlives_its_pod_while_a_member_starts(containerd: Containerd) -> None:
    for container in ("pod", "member"):
        containerd.make_bundle(container, annotations={GROUP: "pod"})
        containerd.run("start", container)
    [shim] = containerd.shims()
    delete(containerd, "pod")
    assert host_process.is_running(shim)
    delete(containerd, "member")
    assert not host_process.is_running(shim)


def test_deleting_one_member_of_a_dead_group_removes_the_group(containerd: Containerd) -> None:
    for container in ("pod", "member"):
        containerd.make_bundle(container, annotations={GROUP: "pod"})
        containerd.run("start", container)
    Ledger(str(containerd.state_of("pod"))).created("pod")
    containerd.kill_shims()
    delete(containerd, "member")
    assert not containerd.state_of("pod").exists()


def test_a_start_that_was_killed_midway_leaves_nothing(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.state_of("c1").mkdir(parents=True)
    delete(containerd)
    assert nothing_is_left(containerd)


def test_the_configuration_is_not_needed(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    containerd.kill_shims()
    containerd.configure("this is not TOML")
    delete(containerd)
    assert nothing_is_left(containerd)


def test_the_spec_is_not_needed(containerd: Containerd) -> None:
    bundle = containerd.make_bundle("c1", annotations={GROUP: "pod"})
    containerd.run("start", "c1")
    containerd.kill_shims()
    (bundle / "config.json").unlink()
    delete(containerd)
    assert not containerd.state_of("pod").exists()
    containerd.socket_path("pod").unlink(missing_ok=True)


def test_a_failure_to_undo_is_one_line_and_stays_in_the_ledger(containerd: Containerd) -> None:
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    containerd.kill_shims()
    aside = containerd.directory / "aside"
    aside.mkdir()
    target = containerd.state_of("c1") / "share"
    target.mkdir()
    Ledger(str(containerd.state_of("c1"))).file(str(target / "file"))
    target.rmdir()
    target.symlink_to(aside)
    (aside / "file").touch()
    reply = containerd.run("delete", "c1")
    assert (reply.returncode, reply.stdout) == (1, b"")
    assert reply.stderr.decode() == (
        f"delete: file {target}/file: a symbolic link is now part of the path; remove it by hand"
    )
    assert (aside / "file").exists()
    target.unlink()
    delete(containerd)
    assert nothing_is_left(containerd)


@pytest.mark.parametrize("action", ["start", "delete"])
@pytest.mark.parametrize("container", ["a/b", "..", ".", "a" * 77, "-a", "a b", "ä"])
def test_an_unsafe_id_is_refused_in_one_line(
    containerd: Containerd, action: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "cwd"
    bundle.mkdir()
    monkeypatch.setattr(containerd, "bundle", lambda _: bundle)
    reply = containerd.run(action, container)
    assert (reply.returncode, reply.stdout) == (1, b"")
    assert reply.stderr.startswith(f"{action}: id ".encode())
    assert b"\n" not in reply.stderr
    assert not containerd.state_dir.exists()
    assert not any(bundle.iterdir())

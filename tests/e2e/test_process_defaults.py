"""The default attributes of a process: the same as under runc, which hands down containerd's."""

from __future__ import annotations

import json
import re
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import new_id
from tests.e2e.described import CAPABILITIES, SETS, Described, specification, unpack_rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.each_release
UNUSUAL = {
    resource.RLIMIT_CPU: 100_000,
    resource.RLIMIT_FSIZE: 1 << 40,
    resource.RLIMIT_DATA: 1 << 42,
    resource.RLIMIT_STACK: 1 << 24,
    resource.RLIMIT_CORE: 1 << 20,
    resource.RLIMIT_RSS: 1 << 42,
    resource.RLIMIT_NPROC: 5000,
    resource.RLIMIT_MEMLOCK: 1 << 22,
    resource.RLIMIT_AS: 1 << 45,
    10: 70_000,  # file locks
    resource.RLIMIT_SIGPENDING: 5000,
    resource.RLIMIT_MSGQUEUE: 700_000,
    15: 1 << 40,  # time without a system call under a realtime policy
}
"""Soft limits: a process cannot raise a hard one again. The number of open files is not among them:
a program in Go hands down the one that it was started with."""
SIGNALS = ("SigBlk", "SigIgn", "SigCgt")


@contextmanager
def unusual_limits(pid: int) -> Iterator[str]:
    """Give a process unusual limits for a block, and yield all of its limits as the kernel shows them."""
    before = {kind: resource.prlimit(pid, kind) for kind in UNUSUAL}
    try:
        for kind, soft in UNUSUAL.items():
            resource.prlimit(pid, kind, (soft, before[kind][1]))
        yield Path(f"/proc/{pid}/limits").read_text()
    finally:
        for kind, limits in before.items():
            resource.prlimit(pid, kind, limits)


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    """A root file system, and room for what processes say."""
    with tempfile.TemporaryDirectory(dir=home, prefix="defaults-") as directory:
        unpack_rootfs(Path(directory, "rootfs"))
        yield Path(directory)


@pytest.fixture(scope="module")
def defaults(either_stack: Stack, place: Path) -> Iterator[tuple[Described, str]]:
    """A container that asks for nothing, and the limits of containerd when it was started."""
    containerd, name = either_stack.containerd, new_id()
    config = place / f"{name}.json"
    spec = specification(place / "rootfs", args=["sleep", "100000"])
    config.write_text(json.dumps(spec))
    with unusual_limits(containerd.pid) as limits:
        options: list[str | Path] = ["--runtime", containerd.runtime, "--detach", "--config", config]
        started = containerd.ctr("run", *options, name)
    try:
        assert started.code == 0, started.stderr
        yield Described(either_stack, name, place), limits
    finally:
        containerd.remove(name)


def test_limits_are_those_of_containerd(defaults: tuple[Described, str]) -> None:
    box, limits = defaults

    assert box.shell("cat /proc/1/limits").splitlines() == limits.splitlines()
    assert box.shell("cat /proc/self/limits").splitlines() == limits.splitlines()


def test_a_requested_limit_replaces_only_that_limit(defaults: tuple[Described, str]) -> None:
    box, limits = defaults
    asked_for = [{"type": "RLIMIT_CPU", "soft": 300, "hard": 400}]
    changed = box.shell("cat /proc/self/limits", rlimits=asked_for).splitlines()

    differing = [line for line in changed if line not in limits.splitlines()]
    assert [line.split() for line in differing] == [["Max", "cpu", "time", "300", "400", "seconds"]]


@pytest.mark.parametrize("process", ["1", "self"], ids=["init", "exec"])
def test_no_signal_is_ignored_or_blocked(defaults: tuple[Described, str], process: str) -> None:
    _, said = defaults[0].exec("cat", f"/proc/{process}/status")

    found = {kind: re.search(rf"{kind}:\t(\w+)", said) for kind in SIGNALS}
    assert {kind: match and int(match[1], 16) for kind, match in found.items()} == dict.fromkeys(SIGNALS, 0)


def test_a_process_is_killed_for_memory_a_little_sooner_than_containerd(
    defaults: tuple[Described, str],
) -> None:
    box, _ = defaults
    containerds = int(Path(f"/proc/{box.stack.containerd.pid}/oom_score_adj").read_text())

    assert box.shell("cat /proc/1/oom_score_adj /proc/self/oom_score_adj") == f"{containerds + 1}\n" * 2


def test_the_mask_of_new_files_is_the_usual_one(defaults: tuple[Described, str]) -> None:
    assert defaults[0].shell("umask; grep Umask /proc/1/status") == "0022\nUmask:\t0022\n"


def test_the_priority_and_the_policy_of_the_scheduler_are_the_usual_ones(
    defaults: tuple[Described, str],
) -> None:
    # Fields of proc(5): priority, nice; realtime priority, policy.
    said = defaults[0].shell("for p in 1 self; do cut -d' ' -f18,19,40,41 /proc/$p/stat; done")
    assert said == "20 0 0 0\n" * 2


def test_nothing_is_open_but_the_three_streams(defaults: tuple[Described, str]) -> None:
    assert defaults[0].shell("ls /proc/1/fd; exec ls /proc/$$/fd").split()[:3] == ["0", "1", "2"]
    assert defaults[0].shell("ls /proc/1/fd").split() == ["0", "1", "2"]


def test_an_exec_that_names_no_capabilities_has_those_of_its_container(
    defaults: tuple[Described, str],
) -> None:
    box, _ = defaults
    show = "grep ^Cap /proc/self/status"
    named = dict.fromkeys(SETS, CAPABILITIES)

    assert box.shell(show) == box.shell(show, capabilities=named)
    assert box.shell(show, capabilities={}) == "".join(
        f"Cap{kind}:\t{0:016x}\n" for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    )


def test_a_signal_to_its_own_group_reaches_no_other_exec(defaults: tuple[Described, str]) -> None:
    box, _ = defaults
    containerd = box.stack.containerd
    status, said = box.exec("sh", "-c", "kill -TERM 0; sleep 100")
    assert (status, said) == (143, "")
    assert containerd.tasks()[box.name][1] == "RUNNING"

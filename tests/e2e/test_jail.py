"""The processes that a guest talks to are confined as the documentation says."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.config import HypervisorConfig
from shim.host import host_process
from shim.host.host_process import HostProcess
from shim.host.ledger import SHIM_PROCESS, Ledger
from shim.machine.cgroup import MOST_TASKS, counting_roots, memory_bound
from tests.e2e import busybox
from tests.e2e.by_hand import ByHand
from tests.e2e.conftest import new_id, write_config
from tests.e2e.containerd import SHIM_DIRECTORY
from tests.e2e.injection import Captive
from tests.e2e.life import MOMENT_S
from tests.e2e.nursery import descendants
from tests.e2e.test_refusals import configured
from tests.waiting import ends, until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

BUILDER = "template's QEMU"
TABLE = Path(__file__).parents[2] / "docs/security.md"
FIRST = HypervisorConfig().jail_first_id
IDS = range(FIRST, FIRST + HypervisorConfig().jail_ids)
ROOTS = counting_roots(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
LIMITS = ("pids.max", "memory.max", "memory.limit_in_bytes")
SETRESUID, OPENAT, MKDIRAT, SYMLINKAT, HERE = 117, 257, 258, 266, -100
#: In the order of their numbers, linux/capability.h.
NAMES = (
    *("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock"),
    *("ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin"),
    *("sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write"),
    *("audit_control", "setfcap"),
)


def documented() -> dict[str, dict[str, str]]:
    """The rows of the table of the jail, by process."""
    lines = TABLE.read_text(encoding="utf-8").partition("## The jail")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    heading, _rule, *rest = rows
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rest}


def in_a_sandbox() -> dict[str, dict[str, str]]:
    """The documented processes of a sandbox."""
    return {name: row for name, row in documented().items() if name != BUILDER}


def processes_of(directory: Path) -> dict[str, int]:
    """The processes of a sandbox by name; those that made a clone are gone."""
    ledger = Ledger(str(directory))
    processes = [entry for entry in ledger.entries() if entry.kind == "process"]
    ledger.close()
    return {
        entry.name: entry.pid
        for entry in processes
        if host_process.is_running(HostProcess(pid=entry.pid, start_time=entry.start_time))
    }


@pytest.fixture(scope="module")
def sandboxes(one_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, int]]]:
    """Two sandboxes with a container each: the processes of each, by name."""
    config = write_config(
        tmp_path_factory.mktemp("jail") / "config.toml",
        state_directory=one_stack.state_directory,
        hypervisor='jail = "required"\n',
    )
    options = ["--detach", "--runtime-config-path", str(config)]
    names = [new_id(), new_id()]
    try:
        for name in names:
            started = one_stack.containerd.run(busybox.IMAGE, name, "sleep", "1000", options=options)
            assert started.code == 0, started.stderr
        yield [processes_of(Path(one_stack.record(name).state_directory)) for name in names]
    finally:
        for name in names:
            one_stack.containerd.remove(name)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def capabilities(mask: str) -> str:
    held = int(mask, 16)
    return ", ".join(name for number, name in enumerate(NAMES) if held >> number & 1) or "none"


def limit(pid: int, name: str) -> set[int]:
    text = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    found = re.search(rf"^{name} +(\d+) +(\d+) ", text, re.MULTILINE)
    assert found, text
    return set(map(int, found.groups()))


def assert_confined(pid: int, row: dict[str, str], *, others: Iterable[int]) -> None:
    """Compare a process with its row of the table, and its namespaces with those of other processes."""
    told = status(pid)
    assert len(set(told["Uid"].split()) | set(told["Gid"].split())) == 1
    assert int(told["Uid"].split()[0]) in IDS
    assert capabilities(told["CapEff"]) == capabilities(told["CapPrm"]) == row["capabilities"]
    # The Rust virtio-fs daemon keeps in each set what it keeps in one.
    rest = {int(told[one], 16) for one in ("CapInh", "CapBnd", "CapAmb")}
    assert rest in ({0}, {int(told["CapEff"], 16)})
    assert (told["NoNewPrivs"], told["Seccomp"]) == (row["NoNewPrivs"], row["seccomp"])
    for kind in row["namespaces of its own"].split(", "):
        own = Path(f"/proc/{pid}/ns/{kind}").readlink()
        assert own not in [Path(f"/proc/{other}/ns/{kind}").readlink() for other in others if other != pid]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert limit(pid, "Max open files") <= {int(row["open files"]), most}
    assert limit(pid, "Max core file size") == {int(row["core"])}


def test_each_process_is_confined_as_documented_and_each_sandbox_has_its_own_user(
    sandboxes: list[dict[str, int]],
) -> None:
    users = []
    lasting = [SHIM_PROCESS, *in_a_sandbox()]
    everything = [os.getpid(), *(processes[name] for processes in sandboxes for name in lasting)]
    for processes in sandboxes:
        users.append({status(processes[name])["Uid"] for name in in_a_sandbox()})
        for name, row in in_a_sandbox().items():
            assert row["user"] == "the sandbox's"
            assert_confined(processes[name], row, others=everything)
    assert [len(each) for each in users] == [1, 1]
    assert users[0] != users[1]


@contextlib.contextmanager
def building(stack: Stack, tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Stop a build of a template while its machine boots: the processes of builder and QEMU."""
    config = write_config(
        tmp_path / "config.toml",
        state_directory=stack.state_directory,
        hypervisor='jail = "required"\n',
        templates=tmp_path / "templates",
    )
    argv: list[str | Path] = [SHIM_DIRECTORY / "hako", "template", "build", "--config", config]

    def booting() -> int | None:
        for one in descendants(builder.pid):
            if " -name template," in one.command:
                return one.pid
        return None

    with subprocess.Popen(argv, stdout=subprocess.PIPE) as builder:
        try:
            qemu = until(booting, within_s=MOMENT_S)
            assert qemu is not None
            os.kill(qemu, signal.SIGSTOP)
            yield builder.pid, qemu
        finally:
            builder.kill()
    assert ends(qemu, within_s=MOMENT_S)
    # The process that removes the rest outlives the builder.
    until(lambda: not (tmp_path / "templates/.building").exists(), within_s=MOMENT_S)


def test_a_machine_that_becomes_a_template_is_confined_and_bounded_as_documented(
    one_stack: Stack, tmp_path: Path
) -> None:
    row = documented()[BUILDER]
    with building(one_stack, tmp_path) as (builder, qemu):
        assert row["user"] == "its own"
        assert_confined(qemu, row, others=[os.getpid(), builder])
        assert not Path(f"/proc/{qemu}/root/etc/shadow").exists()
        groups = [root / f"hako-template-{builder}" for root in ROOTS]
        # QEMU is put there just after it was started.
        assert until(
            lambda: all(str(qemu) in (group / "cgroup.procs").read_text().split() for group in groups),
            within_s=MOMENT_S,
        )
        found = [group / name for group in groups for name in LIMITS]
        assert {file.name for file in found if file.exists() and file.read_text() != "max\n"} >= {"pids.max"}
    assert not any(group.exists() for group in groups)


def test_the_only_host_files_a_process_sees_are_those_given_to_the_guest(
    sandboxes: list[dict[str, int]],
) -> None:
    for processes in sandboxes:
        roots = {name: Path(f"/proc/{processes[name]}/root") for name in in_a_sandbox()}
        assert not any((root / "etc/shadow").exists() or (root / "root").exists() for root in roots.values())
        assert {path.name for path in roots["QEMU"].iterdir()} == {"dev"}
        tops = [top for root in roots.values() for top in tops_of_files(root.parent)]
        assert tops
        # The C daemon keeps its first root open, which has programs and libraries of the host, read-only.
        assert not any({"shadow", "root", "home"} & set(top) for top in tops)


def test_a_process_that_was_taken_over_reads_and_makes_no_file_of_the_host(
    sandboxes: list[dict[str, int]], one_stack: Stack
) -> None:
    [console, *_] = one_stack.state_directory.glob("*/console.log")
    shim = sandboxes[0][SHIM_PROCESS]
    shadows = ["/etc/shadow", "/proc/1/root/etc/shadow", f"/proc/{shim}/root/etc/shadow"]
    paths = [str(path).encode() for path in (*shadows, console)]
    for name, row in in_a_sandbox().items():
        user = int(status(sandboxes[1][name])["Uid"].split()[0])
        acts_as = 0 if "setuid" in row["capabilities"] else user
        with Captive(sandboxes[1][name]) as captive:
            if acts_as != user:
                assert captive.outcome(SETRESUID, *[acts_as] * 3) == "done"
            read = {path: captive.outcome(OPENAT, HERE, path, os.O_RDONLY) for path in paths}
            assert set(read.values()) <= {"ENOENT", "EACCES"}, (name, read)
            for place in (HERE, *directories_beside_the_share(captive.pid)):
                made = {
                    captive.outcome(SYMLINKAT, b"/run", place, b"probe"),
                    captive.outcome(MKDIRAT, place, b"probe", 0o777),
                    captive.outcome(OPENAT, place, b"probe", os.O_CREAT | os.O_WRONLY, 0o666),
                }
                assert made <= {"EACCES", "EROFS", "ENOENT"}, (name, place)
            if acts_as != user:
                assert captive.outcome(SETRESUID, *[user] * 3) == "done"


def directories_beside_the_share(pid: int) -> list[int]:
    """List the descriptors of directories, except those that are below the process's root: its share."""
    links = {int(one.name): one for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_dir()}
    return [number for number, one in links.items() if len(one.readlink().parts) < 2 or not is_inside(one)]


def is_inside(directory: Path) -> bool:
    """Tell whether the path of an open directory leads to it from its process's root."""
    root = directory.parents[1] / "root"
    found = root / str(directory.readlink()).lstrip("/")
    return found.exists() and found.samefile(directory)


def test_a_process_that_was_taken_over_reaches_no_other_process(sandboxes: list[dict[str, int]]) -> None:
    shim = sandboxes[0][SHIM_PROCESS]
    outside: dict[str, tuple[int | bytes, ...]] = {
        "fsopen": (430, b"proc", 0),
        "open_tree": (428, HERE, b"/", 1),
        "pidfd_open": (434, shim, 0),
        "internet socket": (41, 2, 1, 0),
    }
    # QEMU's own filter kills it for these, and a virtio-fs daemon's for most calls.
    killing: dict[str, tuple[int | bytes, ...]] = {
        "ptrace": (101, 16, shim, 0, 0),
        "setns": (308, 0, 0),
        **{f"namespace {flag:x}": (272, flag) for flag in (0x1000_0000, 0x2_0000, 0x2000_0000, 0x4000_0000)},
    }
    for name, calls in {"QEMU": outside, "vhost-device-vsock": {**outside, **killing}}.items():
        with Captive(sandboxes[1][name]) as captive:
            told = {what: captive.outcome(*call) for what, call in calls.items()}
            assert told == dict.fromkeys(calls, "EPERM"), name
            assert captive.outcome(62, shim, 0) == "ESRCH", name


def tops_of_files(process: Path) -> Iterator[list[str]]:
    """List the tops of all open directories of a process that runs on."""
    for one in (process / "fd").iterdir():
        if one.is_dir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                yield top_of(one)


def top_of(directory: Path) -> list[str]:
    """Go up from an open directory as far as that is possible, and list what is there and in ``etc``."""
    here = os.open(directory, os.O_PATH)
    while True:
        above = os.open("..", os.O_PATH, dir_fd=here)
        is_top = os.path.samestat(os.fstat(here), os.fstat(above))
        os.close(here)
        here = above
        if is_top:
            break
    try:
        top = Path(f"/proc/self/fd/{here}")
        return [path.name for place in (top, top / "etc") if place.is_dir() for path in place.iterdir()]
    finally:
        os.close(here)


@pytest.fixture
def existing_cgroup() -> Iterator[str]:
    """A cgroup in each hierarchy, which the test must leave as empty as it was."""
    name = new_id()
    directories = [root / name for root in ROOTS]
    for directory in directories:
        directory.mkdir()
    yield name
    for directory in directories:
        directory.rmdir()


def test_a_machine_with_root_ports_is_confined_bounded_and_killed_as_readily_as_its_container(
    one_stack: Stack, tmp_path: Path, existing_cgroup: str
) -> None:
    score = 777
    linux = {"cgroupsPath": f"/{existing_cgroup}"}
    with (
        configured(one_stack, hypervisor='memory_mib = 192\nroot_ports = 1\njail = "required"'),
        ByHand(one_stack, tmp_path, linux=linux, process={"oomScoreAdj": score}) as box,
    ):
        state = Path(one_stack.record(box.id).state_directory)
        processes = processes_of(state)
        pids = [processes[name] for name in in_a_sandbox()]
        for name, row in in_a_sandbox().items():
            assert_confined(processes[name], row, others=[os.getpid()])
        root = Path(f"/proc/{processes['QEMU']}/root")
        assert not any((root / name).exists() for name in ("etc/shadow", "root", "dev/vfio", "dev/mem"))
        groups = [root / existing_cgroup / f"hako-{state.name}" for root in ROOTS]
        found = [group / name for group in groups for name in LIMITS]
        limits = {file.name: int(file.read_text()) for file in found if file.exists()}
        members = [set((group / "cgroup.procs").read_text().split()) for group in groups]
        listed = [group / "devices.list" for group in groups]
        devices = {line for file in listed if file.exists() for line in file.read_text().splitlines()}
        scores = {Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in pids}
        assert not any((group.parent / "cgroup.procs").read_text() for group in groups)
    assert all(inside >= set(map(str, pids)) for inside in members)
    assert limits.pop("pids.max") == MOST_TASKS
    assert [*limits.values()] == [memory_bound(192 << 20)]
    # Version 2 has no list to look at; KVM is allowed where it is used.
    assert devices - {"c 10:232 rw"} in (
        {"b *:* m", "c *:* m", *(f"c 1:{minor} rw" for minor in (3, 5, 8, 9))},
        set(),
    )
    assert scores == {f"{score}"}


def test_a_sandbox_without_a_given_cgroup_has_its_own_until_its_end(one_stack: Stack, tmp_path: Path) -> None:
    with ByHand(one_stack, tmp_path) as box:
        state = Path(one_stack.record(box.id).state_directory)
        groups = [root / f"hako-{state.name}" for root in ROOTS]
        pid = str(processes_of(state)["QEMU"])
        assert all(pid in (group / "cgroup.procs").read_text().split() for group in groups)
    assert not any(group.exists() for group in groups)


def test_the_user_of_a_killed_shim_is_given_to_no_other_while_it_has_a_process(
    one_stack: Stack, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "config.toml",
        state_directory=one_stack.state_directory,
        hypervisor=f'jail = "required"\njail_first_id = {IDS[-1] + 1}\njail_ids = 1\n',
    )
    options = ["--runtime-config-path", str(config)]
    killed, other = new_id(), new_id()
    started = one_stack.containerd.run(
        busybox.IMAGE, killed, "sleep", "1000", options=["--detach", "--null-io", *options]
    )
    assert started.code == 0, started.stderr
    processes = processes_of(Path(one_stack.record(killed).state_directory))
    stays = ["setpriv", f"--reuid={IDS[-1] + 1}", "--clear-groups", "sleep", "1000"]
    with subprocess.Popen(stays) as left:
        try:
            until(lambda: status(left.pid)["Uid"].split()[0] == stays[1].partition("=")[2])
            os.kill(processes[SHIM_PROCESS], signal.SIGKILL)
            assert all(ends(pid, within_s=MOMENT_S) for pid in processes.values())
            one_stack.containerd.remove(killed)
            refused = one_stack.containerd.run(busybox.IMAGE, other, "true", options=["--rm", *options])
            assert "boot: jail: no user of its own: none of 1 numbers is free" in refused.stderr
        finally:
            left.kill()
    done = one_stack.containerd.run(busybox.IMAGE, other, "true", options=["--rm", *options])
    assert done.code == 0, done.stderr

"""Machines are cloned from a template if there is one; containers also run if the template is broken."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id, write_config
from tests.e2e.containerd import SHIM_DIRECTORY
from tests.e2e.life import MOMENT_S
from tests.e2e.nursery import descendants, processes
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.e2e.conftest import Stack
    from tests.e2e.containerd import Result
    from tests.e2e.nursery import Process

pytestmark = [pytest.mark.hako, pytest.mark.timeout(300)]

BUILD_S = patient(200.0)  # a nice builder on a busy machine
MIB = 1 << 20
CLONED, COLD, BUILDING = ": cloned", "boots cold", "built in the background"
BUILDER = "shim.cli template build"


def until(condition: Callable[[], object], *, what: str, timeout_s: float = BUILD_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)


@dataclass(slots=True, kw_only=True)
class Node:
    """A containerd whose sandboxes use a separate store of templates."""

    stack: Stack
    store: Path
    config: Path
    log_start: int = 0

    def run(self, *command: str, options: Sequence[str | Path] = ("--rm",)) -> Result:
        self.log_start = self.stack.containerd.log.stat().st_size
        return self.stack.containerd.run(
            IMAGE, new_id(), *command, options=[*options, "--runtime-config-path", self.config]
        )

    def log(self) -> str:
        """The log since the last container was requested."""
        with self.stack.containerd.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def wait_for_log(self, text: str) -> None:
        """Wait for a text in it: containerd copies what shims write."""
        until(lambda: text in self.log(), what=f"the log says {text!r}", timeout_s=MOMENT_S)

    def hako(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv: list[str | Path] = [SHIM_DIRECTORY / "hako", "template", *arguments, "--config", self.config]
        return subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_S, check=False)

    @property
    def templates(self) -> list[Path]:
        return [path for path in self.store.glob("*") if path.is_dir() and not path.name.startswith(".")]

    @property
    def leftovers(self) -> list[str]:
        """The files in the store beside templates."""
        kept = {"lock", "log", *(path.name for path in self.templates)}
        return [path.name for path in self.store.glob("*") if path.name not in kept]

    def builders(self) -> list[Process]:
        """The processes that build a template in the background, oldest first."""
        everything = self.stack.containerd.nursery.descendants()
        found = [process for process in everything if BUILDER in process.command]
        return sorted(found, key=lambda process: process.start_time)

    def wait_for_template(self) -> Path:
        """Wait for the one template that a builder makes in the background, and for the builder's end."""
        until(lambda: self.templates, what="there is a template")
        self.wait_for_builders_end()
        [template] = self.templates
        return template

    def wait_for_builders_end(self) -> None:
        until(lambda: not self.builders(), what="no builder runs")


@pytest.fixture
def empty_node(one_stack: Stack, home: Path) -> Iterator[Node]:
    """A node whose first sandbox is yet to come."""
    place = home / new_id()
    place.mkdir()
    config = write_config(
        place / "config.toml",
        state_directory=one_stack.state_directory,
        hypervisor=f'template = "auto"\ntemplate_dir = "{place / "templates"}"',
    )
    node = Node(stack=one_stack, store=place / "templates", config=config)
    yield node
    node.wait_for_builders_end()
    shutil.rmtree(place)


@pytest.fixture
def node(empty_node: Node, templates: Path) -> Node:
    """A node that has a template."""
    subprocess.run(["/bin/cp", "--archive", "--sparse=always", templates, empty_node.store], check=True)
    return empty_node


def test_a_clone_refuses_a_bad_command_in_the_same_words(node: Node) -> None:
    # The template has a runtime that waits for the first container, under its own name.
    refused = node.run("/no/such/program")
    node.wait_for_log(CLONED)
    assert refused.code != 0
    assert "/no/such/program" in refused.stderr
    assert "+ahead" not in refused.stderr


def test_a_container_runs_in_a_clone(node: Node) -> None:
    result = node.run("sh", "-c", "echo out; echo err >&2; exit 7")

    assert (result.code, result.stdout, result.stderr) == (7, "out\n", "err\n")
    node.wait_for_log(CLONED)
    assert COLD not in node.log()


def test_the_first_container_leaves_a_template_and_the_second_is_a_clone(empty_node: Node) -> None:
    node = empty_node
    first = node.run("echo", "first")
    assert first.stdout == "first\n", first.stderr
    node.wait_for_log("there is none yet; boots cold")
    node.wait_for_log(BUILDING)

    node.wait_for_template()
    assert node.leftovers == []
    assert node.store.stat().st_mode & 0o777 == 0o700
    second = node.run("echo", "second")
    assert second.stdout == "second\n", second.stderr
    node.wait_for_log(CLONED)


def test_two_clones_share_neither_randomness_nor_names_and_know_the_time(node: Node) -> None:
    script = "cat /proc/sys/kernel/random/boot_id; head -c 32 /dev/urandom | sha256sum; hostname; date +%s"

    def facts() -> tuple[str, ...]:
        name = new_id()
        before_s = time.time()
        result = node.run("sh", "-c", script, options=["--rm", "--hostname", name] if named else ["--rm"])
        after_s = time.time()
        *unique, seconds = result.stdout.splitlines()
        node.wait_for_log(CLONED)
        assert before_s - 1 <= int(seconds) <= after_s + 1
        return tuple(unique)

    named = "--hostname" in node.stack.containerd.ctr("run", "--help").stdout
    one, two = facts(), facts()

    assert len(one) == 3
    assert one[0] != two[0], "boot_id"
    assert one[1] != two[1], "random bytes"
    assert not named or one[2] != two[2], "hostname"


def test_a_clone_grows_to_what_its_container_may_use(node: Node) -> None:
    options = ["--rm", "--memory-limit", str(256 * MIB), "--cpu-quota", "50000", "--cpu-period", "100000"]
    result = node.run("sh", "-c", "nproc; grep MemTotal /proc/meminfo", options=options)

    processors, _, kib, _ = result.stdout.split()
    node.wait_for_log(CLONED)
    assert int(processors) == 2
    assert 600 * 1024 < int(kib) < 768 * 1024


def spoil_memory(template: Path) -> None:
    os.truncate(template / "memory", 4096)


def flip_a_bit_of_memory(template: Path) -> None:
    with (template / "memory").open("r+b") as memory:
        memory.seek(20 * MIB)
        [byte] = memory.read(1)
        memory.seek(20 * MIB)
        memory.write(bytes([byte ^ 1]))


def garble_memory(template: Path) -> None:
    """Let it load, into a guest that cannot live."""
    path = template / "memory"
    before = path.stat()
    with path.open("r+b") as memory:
        for place in range(16 * MIB, 64 * MIB, 4096):
            memory.seek(place)
            memory.write(b"\xcc" * 4096)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def spoil_state(template: Path) -> None:
    state = template / "state"
    state.write_bytes(state.read_bytes()[:-1000] + os.urandom(1000))


def spoil_description(template: Path) -> None:
    (template / "template.json").write_text("{}")


def take_memory_away(template: Path) -> None:
    (template / "memory").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        garble_memory,
        *(  # tests/integration/hypervisor/test_template.py finds these out by day
            pytest.param(one, marks=pytest.mark.nightly)
            for one in (flip_a_bit_of_memory, spoil_memory, spoil_state, spoil_description, take_memory_away)
        ),
    ],
)
def test_a_broken_template_is_replaced_and_its_container_boots_cold(
    node: Node, spoil: Callable[[Path], None]
) -> None:
    [broken] = node.templates
    inode = broken.stat().st_ino
    spoil(broken)

    result = node.run("echo", "runs")

    assert (result.code, result.stdout) == (0, "runs\n"), result.stderr
    node.wait_for_log("the machine boots cold")
    [reason] = [line for line in node.log().splitlines() if "the machine boots cold" in line]
    assert "it is removed" in reason
    node.wait_for_log(BUILDING)
    rebuilt = node.wait_for_template()
    assert rebuilt.stat().st_ino != inode
    assert node.leftovers == [f"{rebuilt.name}.discarded"]
    assert node.run("echo", "clone").stdout == "clone\n"
    node.wait_for_log(CLONED)


@pytest.mark.nightly
def test_a_template_of_another_image_is_not_used_and_goes_when_there_is_a_new_one(
    node: Node, home: Path
) -> None:
    [old] = node.templates
    kernel = home / new_id()
    shutil.copy("/var/lib/hako/guest/vmlinux", kernel)
    settings = node.config.read_text(encoding="utf-8")
    node.config.write_text(settings.replace("[guest]", f'[guest]\nkernel = "{kernel}"'), encoding="utf-8")
    try:
        assert node.hako("build").returncode == 0
        assert len(node.templates) == 2
        before = {*node.templates}
        again = kernel.with_suffix(".new")
        shutil.copy(kernel, again)
        again.rename(kernel)

        assert node.run("true").code == 0
        node.wait_for_log("there is none yet; boots cold")
        until(lambda: {*node.templates} - before, what="there is a template for the new kernel")
        node.wait_for_builders_end()
        assert len(node.templates) == 2
        assert old in node.templates
        assert node.run("true").code == 0
        node.wait_for_log(CLONED)
    finally:
        kernel.unlink()


@pytest.mark.nightly
def test_other_machines_boot_cold_while_a_template_is_built(empty_node: Node) -> None:
    node = empty_node
    with building(node) as builder:
        assert node.run("echo", "runs").stdout == "runs\n"
        waited_for = ("one is being built; boots cold", CLONED)  # if it was faster
        until(lambda: any(text in node.log() for text in waited_for), what="the log says how it has started")
        assert BUILDING not in node.log()
        assert builder.wait(BUILD_S) == 0
    assert len(node.templates) == 1


@contextlib.contextmanager
def building(node: Node) -> Iterator[subprocess.Popen[bytes]]:
    """Build a template by hand, and see that it is under way."""
    argv: list[str | Path] = [SHIM_DIRECTORY / "hako", "template", "build", "--config", node.config]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True) as builder:
        try:
            until((node.store / ".building").exists, what="a build is under way")
            yield builder
        finally:
            builder.kill()


def is_written(node: Node) -> bool:
    """Tell whether a template has files, but is not published."""
    with contextlib.suppress(FileNotFoundError):  # published meanwhile
        return any((node.store / ".building").glob("template/*"))
    return False


MOMENTS: dict[str, Callable[[Node, set[Process]], object]] = {
    "before its machine runs": lambda node, _: (node.store / ".building").exists(),
    "while its machine boots": lambda _, below: below,
    "while it writes": lambda node, _: is_written(node),
    "when it has published": lambda node, _: node.templates,
}
BY_DAY = ("while its machine boots", "when it has published")


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        *(
            pytest.param(signal.SIGKILL, moment, marks=() if moment in BY_DAY else pytest.mark.nightly)
            for moment in MOMENTS
        ),
        pytest.param(signal.SIGTERM, "while its machine boots", marks=pytest.mark.nightly),
    ],
)
def test_a_builder_that_is_killed_leaves_nothing(
    empty_node: Node, number: signal.Signals, moment: str
) -> None:
    node = empty_node
    below: set[Process] = set()

    def has_come(builder: subprocess.Popen[bytes]) -> object:
        below.update(one for one in descendants(builder.pid) if "-name template," in one.command)
        return MOMENTS[moment](node, below)

    with building(node) as builder:
        until(lambda: has_come(builder), what=moment)
        builder.send_signal(number)
        builder.wait(BUILD_S)

    until(lambda: not (node.store / ".building").exists(), what="nothing is left")
    births = {(one.pid, one.start_time) for one in below}
    until(
        lambda: births.isdisjoint(
            (one.pid, one.start_time) for one in processes().values() if one.state != "Z"
        ),
        what="no machine is left",
    )
    assert node.leftovers == []


@pytest.mark.nightly
def test_a_builder_outlives_the_sandbox_that_started_it(empty_node: Node) -> None:
    node = empty_node
    name = new_id()
    containerd = node.stack.containerd
    options: list[str | Path] = ["--detach", "--runtime-config-path", node.config]
    assert containerd.run(IMAGE, name, "sleep", "1000", options=options).code == 0
    try:
        until((node.store / ".building").exists, what="a build is under way")
        builder, *_ = node.builders()
        place = Path("/proc", str(builder.pid))
        opened = {str((place / "fd" / number).readlink()) for number in "012"}
        assert opened == {"/dev/null", str(node.store / "log")}
        assert os.getsid(builder.pid) == builder.pid
        assert os.getpriority(os.PRIO_PROCESS, builder.pid) == 19
        assert (place / "ns/mnt").readlink() == Path(f"/proc/{containerd.pid}/ns/mnt").readlink()
        assert (place / "cgroup").read_bytes() == Path("/proc/self/cgroup").read_bytes()
    finally:
        containerd.remove(name)
    node.wait_for_template()


def test_a_pod_may_refuse_to_be_a_clone(node: Node) -> None:
    result = node.run("echo", "runs", options=["--rm", "--annotation", "io.hako.template=off"])

    assert result.stdout == "runs\n", result.stderr
    node.wait_for_log("wants no clone; boots cold")
    assert CLONED not in node.log()
    assert BUILDING not in node.log()


def test_a_store_that_others_can_write_to_is_not_used(node: Node) -> None:
    node.store.chmod(0o777)

    result = node.run("echo", "runs")

    assert result.stdout == "runs\n", result.stderr
    node.wait_for_log("no other can write to")
    assert CLONED not in node.log()
    listed = node.hako("build")
    assert listed.returncode == 1
    assert listed.stderr.count("\n") == 1


def test_templates_are_listed_built_and_removed_by_hand(empty_node: Node) -> None:
    node = empty_node
    assert node.hako("ls").stdout.splitlines() == ["KEY  SIZE  BUILT  USED  FOR"]

    built = node.hako("build")
    assert (built.returncode, built.stderr) == (0, "")
    [path] = node.templates
    assert built.stdout == f"{path}\n"
    memory = (path / "memory").stat()
    assert node.hako("build").stdout == f"{path}\n"
    assert os.path.samestat((path / "memory").stat(), memory), "it was there already"
    assert json.loads(node.hako("build", "--json").stdout) == {"key": path.name, "path": str(path)}

    _, line = node.hako("ls").stdout.splitlines()
    assert line.startswith(path.name[:12])
    assert " MiB " in line
    assert "1 of " in line
    assert "/var/lib/hako/guest/vmlinux" in line
    assert node.hako("rm", path.name[:12]).stdout == f"{path.name}\n"
    assert node.templates == []
    missing = node.hako("rm", path.name[:12])
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "there is none; see `hako template ls`" in missing.stderr
    assert json.loads(node.hako("rm", "--all", "--json").stdout) == {"removed": []}
    node.hako("build")
    assert json.loads(node.hako("rm", "--all", "--json").stdout) == {"removed": [path.name]}

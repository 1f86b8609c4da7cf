"""A process in the container sees every field of the specification."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import stat
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.empty_pb2 import Empty

from proto.containerd import task_v3_pb2
from shim.agent.oci_fields import ROWS, Fate
from tests.e2e import census
from tests.e2e.busybox import IMAGE, rootfs_archive
from tests.e2e.conftest import new_id
from tests.e2e.containerd import CALL_TIMEOUT_S
from tests.e2e.life import until
from tests.e2e.specified import (
    CAP_SYS_ADMIN,
    LIMITS,
    SEEN,
    SEEN_BY_OTHER_TESTS,
    Seen,
    capability,
    specification,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

DEADLINE_S = CALL_TIMEOUT_S
ROWS_OF_EXEC, COLUMNS_OF_EXEC = 31, 97


@dataclass(frozen=True, slots=True)
class Box:
    """A container with that specification, and its side on the host."""

    stack: Stack
    name: str
    volume: Path
    file: Path
    service: Path

    def call(self, method: str, **fields: Any) -> Any:
        """Call one method of the shim's task service."""
        requests: dict[str, tuple[type[Message], type[Message]]] = {
            "Exec": (task_v3_pb2.ExecProcessRequest, Empty),
            "Start": (task_v3_pb2.StartRequest, task_v3_pb2.StartResponse),
            "Wait": (task_v3_pb2.WaitRequest, task_v3_pb2.WaitResponse),
            "Delete": (task_v3_pb2.DeleteRequest, task_v3_pb2.DeleteResponse),
            "Update": (task_v3_pb2.UpdateTaskRequest, Empty),
        }
        request, response = requests[method]
        with grpc.insecure_channel(f"unix://{self.service}") as channel:
            call = channel.unary_unary(
                f"/containerd.task.v3.Task/{method}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            return call(request(id=self.name, **fields), timeout=DEADLINE_S)

    def exec_process(self, process: dict[str, Any], *, exec_id: str, output: Path) -> str:
        """Run a process that is given whole, as a client other than ctr can."""
        packed = Packed(
            type_url="types.containerd.io/opencontainers/runtime-spec/1/Process",
            value=json.dumps(process).encode(),
        )
        self.call("Exec", exec_id=exec_id, spec=packed, stdout=f"file://{output}", stderr=f"file://{output}")
        self.call("Start", exec_id=exec_id)
        self.call("Wait", exec_id=exec_id)
        self.call("Delete", exec_id=exec_id)
        return output.read_text()


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    """A directory of the host with a root file system, a volume with a mount in it, and a file."""
    with tempfile.TemporaryDirectory(dir=home, prefix="spec-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
            archive.extractall(place / "rootfs", filter="fully_trusted")  # noqa: S202 - made by this test
        nested = place / "volume/nested"
        nested.mkdir(parents=True)
        (place / "volume/plain").write_text("from the host\n")
        (place / "volume").chmod(0o777)
        (place / "file").write_text("a file of the host\n")
        (place / "file").chmod(0o666)
        subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "hako-nested", nested], check=True)
        try:
            (nested / "deep").write_text("below\n")
            yield place
        finally:
            subprocess.run(["/usr/bin/umount", nested], check=True)


@pytest.fixture(scope="module")
def box(one_stack: Stack, place: Path) -> Iterator[Box]:
    """One container that asks for everything; a census follows its end."""
    name = new_id()
    spec = specification(rootfs=place / "rootfs", volume=place / "volume", file=place / "file")
    config = place / "config.json"
    config.write_text(json.dumps(spec))
    containerd = one_stack.containerd
    before = census.take(containerd, state_directory=one_stack.state_directory)
    started = containerd.ctr("run", "--runtime", containerd.runtime, "--detach", "--config", config, name)
    try:
        assert started.code == 0, started.stderr
        service = Path(one_stack.record(name).state_directory) / "grpc.sock"
        yield Box(one_stack, name, place / "volume", place / "file", service)
    finally:
        containerd.remove(name)
    assert census.difference(before, containerd, state_directory=one_stack.state_directory) == []


@pytest.fixture(scope="module")
def answers(box: Box) -> dict[str, str]:
    """The output of every command of ``SEEN``, all run by one exec."""
    commands = sorted({seen.command for seen in SEEN})
    script = "".join(f"echo; echo '@ {number}'; ({line}) 2>&1\n" for number, line in enumerate(commands))
    result = box.stack.containerd.exec(box.name, "answers", "sh", "-c", script)
    parts = re.split(r"\n@ \d+\n", result.stdout)[1:]
    assert len(parts) == len(commands), result
    return dict(zip(commands, parts, strict=True))


@pytest.mark.parametrize("seen", SEEN, ids=lambda seen: f"{seen.fields.split()[0]}: {seen.command[:30]}")
def test_a_process_sees_each_field_of_its_specification(answers: dict[str, str], seen: Seen) -> None:
    assert re.search(seen.expected, answers[seen.command])


def test_every_field_that_is_sent_is_seen_by_some_test() -> None:
    tested = {field for seen in SEEN for field in seen.fields.split()} | SEEN_BY_OTHER_TESTS
    assert {row.path for row in ROWS if row.fate in {Fate.SENT, Fate.REPLACED}} - tested == set()


def test_the_host_sees_what_is_written_through_a_bind_mount(box: Box) -> None:
    written = box.stack.containerd.exec(
        box.name, "write", "sh", "-c", "echo one >/volume/new; echo two >/etc/file"
    )
    assert written.code == 0, written.stderr
    assert (box.volume / "new").read_text() == "one\n"
    assert (box.volume / "new").stat().st_uid == 1000
    assert box.file.read_text() == "two\n"
    box.file.write_text("a file of the host\n")


def test_a_mount_made_later_on_the_host_is_seen_where_propagation_is_asked_for(box: Box) -> None:
    late = box.volume / "late"
    late.mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "hako-late", late], check=True)
    try:
        (late / "file").write_text("later\n")
        look = partial(box.stack.containerd.exec, box.name, "late", "cat", "/following/late/file")
        # The shim hears of the mount, and shows it to the guest.
        until(lambda: look().stdout == "later\n", what="the mount is seen")
    finally:
        # The guest's kernel, and so the virtio-fs daemon, remembers the directories that it has seen.
        subprocess.run(["/usr/bin/umount", "--lazy", late], check=True)
        late.rmdir()


def test_an_exec_has_a_process_of_its_own(box: Box, tmp_path: Path) -> None:
    process = {
        "args": ["sh", "-c", "id; pwd; env; umask; ulimit -n; ulimit -Hn; cat /proc/self/status"],
        "env": ["PATH=/bin", "ONLY=this"],
        "cwd": "/etc",
        "user": {"uid": 7, "gid": 8, "additionalGids": [9]},
        "capabilities": {"bounding": ["CAP_SYS_ADMIN"], "inheritable": [], "permitted": [], "effective": []},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}],
        "noNewPrivileges": False,
        "oomScoreAdj": 5,
    }
    seen = box.exec_process(process, exec_id="own", output=tmp_path / "output")

    assert seen.startswith("uid=7 gid=8 groups=9\n/etc\n")
    assert "ONLY=this\n" in seen
    assert "COLOUR" not in seen
    assert "\n100\n200\n" in seen
    for expected in (
        capability("Bnd", CAP_SYS_ADMIN),
        capability("Eff", 0),
        capability("Inh", 0),
        r"NoNewPrivs:\s+0\n",
        r"Seccomp:\s+2\n",
    ):
        assert re.search(expected, seen), expected


def test_the_terminal_of_an_exec_has_the_size_its_process_asks_for(box: Box, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = {
        "args": ["stty", "size"],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "user": {},
        "terminal": True,
        "consoleSize": {"height": ROWS_OF_EXEC, "width": COLUMNS_OF_EXEC},
    }
    packed = Packed(type_url="Process", value=json.dumps(process).encode())
    box.call("Exec", exec_id="tty", spec=packed, terminal=True, stdout=f"file://{output}")
    box.call("Start", exec_id="tty")
    box.call("Wait", exec_id="tty")
    box.call("Delete", exec_id="tty")
    assert output.read_text() == f"{ROWS_OF_EXEC} {COLUMNS_OF_EXEC}\n"


@pytest.mark.parametrize(
    ("limits", "seen"),
    [
        ({"memory": {"limit": 48 << 20, "swap": 48 << 20}}, f"memory.max:{48 << 20}\n"),
        ({"memory": {"limit": -1, "swap": -1}}, "memory.max:max\n"),
        ({"cpu": {"quota": 20000, "period": 40000}}, "cpu.max:20000 40000\n"),
        ({"cpu": {"quota": -1, "period": 100000}}, "cpu.max:max 100000\n"),
        ({"cpu": {"shares": 1024, "cpus": "0-127", "mems": "0-1"}}, "cpu.weight:39\n"),
        ({"pids": {"limit": 77}}, "pids.max:77\n"),
        ({"pids": {"limit": -1}}, "pids.max:max\n"),
    ],
    ids=str,
)
def test_limits_can_be_changed_and_lifted(box: Box, limits: dict[str, Any], seen: str) -> None:
    url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    box.call("Update", resources=Packed(type_url=url, value=json.dumps(limits).encode()))

    assert seen in box.stack.containerd.exec(box.name, "limits", "sh", "-c", LIMITS).stdout


def beside(box: Box) -> list[str]:
    """Ask for a container in a machine that runs already."""
    return ["--annotation", f"io.containerd.runc.v2.group={box.name}"]


def refused(stack: Stack, *options: str | Path) -> str:
    """Run a container that cannot be, and return the one line that says why."""
    result = stack.containerd.run(IMAGE, (name := new_id()), "true", options=options)
    if result.code == 0 or name in stack.containerd.containers():
        stack.containerd.remove(name)
    lines = result.stderr.strip().splitlines()
    assert (result.code, len(lines)) == (1, 1), result.stderr
    return lines[0]


@pytest.mark.parametrize("kind", ["socket", "FIFO", "block device", "character device", "nothing"])
def test_only_files_and_directories_can_be_bound(box: Box, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    with socket.socket(socket.AF_UNIX) as opened:
        if kind == "socket":
            opened.bind(str(source))
        elif kind != "nothing":
            types = {"FIFO": stat.S_IFIFO, "block device": stat.S_IFBLK, "character device": stat.S_IFCHR}
            os.mknod(source, types[kind] | 0o600, os.makedev(1, 3))
        mount = f"type=bind,src={source},dst=/x,options=rbind"
        line = refused(box.stack, *beside(box), "--mount", mount)

    assert f"{source}: {'No such file or directory' if kind == 'nothing' else f'is a {kind}'}" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--net-host"], "linux.namespaces: without network it asks for the host's network"),
        (["--mount", "type=bind,src=/dev/log,dst=/dev/log,options=rbind"], "/dev/log"),
    ],
    ids=["network of the host", "path of /dev"],
)
def test_a_request_for_the_hosts_own_objects_is_refused_by_name(
    one_stack: Stack, options: list[str], words: str
) -> None:
    assert words in refused(one_stack, *options)


def test_a_device_of_the_host_is_refused_by_name(box: Box, tmp_path: Path) -> None:
    device = tmp_path / "disk"
    os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(7, 99))

    assert f"linux.devices: {device}: " in refused(box.stack, *beside(box), "--device", device)


def test_a_privileged_container_has_every_capability_and_the_devices_of_the_guest(one_stack: Stack) -> None:
    script = (
        "grep CapBnd /proc/self/status; ls /dev; echo x >/proc/sys/kernel/hostname; hostname; dmesg | wc -l"
    )
    result = one_stack.containerd.run(
        IMAGE, new_id(), "sh", "-c", script, options=["--rm", "--privileged", "--seccomp"]
    )

    assert result.code == 0, result.stderr
    [capabilities] = re.findall(r"CapBnd:\s+(\w+)", result.stdout)
    mine = re.search(r"CapBnd:\s+(\w+)", Path("/proc/self/status").read_text())
    assert mine is not None
    assert capabilities == mine[1]
    assert {"fuse", "kmsg", "null"} <= set(result.stdout.split())
    assert "\nx\n" in result.stdout


def test_a_user_namespace_maps_ids(one_stack: Stack) -> None:
    result = one_stack.containerd.run(
        IMAGE,
        new_id(),
        "cat",
        *("/proc/self/uid_map", "/proc/self/gid_map"),
        options=["--rm", "--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"],
    )

    assert result.stdout.split() == ["0", "100000", "65536", "0", "200000", "65536"], result.stderr

"""A parked sandbox leaves the memory, and goes on later with its files, connections and processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.telemetry.event_feed import AWAKE, PARKED
from tests.e2e.busybox import IMAGE, PYTHON, PYTHON_OPTIONS
from tests.e2e.conftest import _census, new_id
from tests.e2e.containerd import SHIM_DIRECTORY
from tests.e2e.test_refusals import configured
from tests.network_space import Space, add_cable, new_space
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

DEADLINE_S = patient(60.0)
PARK_AFTER_S = 1
PARK_ANNOTATION = "io.hako.park_after_s"
PORT = 7000
CLOCK_ERROR_S = 0.5
PROGRAM = """
import hashlib, json, os, socket, sys, time
pattern = os.urandom(8 << 20)
digest = hashlib.sha256(pattern).digest()
file = open("/volume/file", "r+")
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
for line in sys.stdin:
    connection.sendall(line.encode())
    file.write(line)
    file.flush()
    print(json.dumps({
        "pattern": hashlib.sha256(pattern).digest() == digest,
        "echo": connection.recv(1000).decode(),
        "time": time.time(),
    }), flush=True)
"""


class Sandbox:
    """A sandbox, asked over the management API."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.record = stack.record(name)
        self._seen = 0

    def describe(self) -> Any:
        asked = (self.record, "Describe", api.DescribeRequest(), api.DescribeResponse)
        return asyncio.run(shims.ask(*asked, timeout_s=DEADLINE_S))

    def wait_for(self, topic: str) -> None:
        """Wait for the next event of a topic."""

        async def wait() -> None:
            following = shims.stream_events(self.record, follow=True, timeout_s=DEADLINE_S)
            async with contextlib.aclosing(following) as events:
                async for event in events:
                    if event.topic == topic and event.number > self._seen:
                        self._seen = event.number
                        return

        asyncio.run(wait())

    def memory_bytes(self) -> int:
        """The guest's memory that is in RAM."""
        [qemu] = [each.pid for each in self.describe().processes if each.name == "QEMU"]
        found = {}
        for descriptor in Path(f"/proc/{qemu}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if "memfd:" in str(descriptor.readlink()):
                    status = descriptor.stat()
                    found[status.st_ino] = status.st_blocks * 512
        assert found
        return sum(found.values())


class Box(Sandbox):
    """A sandbox whose container holds memory, a file of a volume, and a TCP connection."""

    def __init__(self, stack: Stack, name: str, volume: Path, process: subprocess.Popen[str]) -> None:
        super().__init__(stack, name)
        self.stack, self.name, self.volume = stack, name, volume
        self._process = process
        self._sent_at_s = 0.0

    def command(self, word: str) -> Any:
        """Run a command of ``hako`` for it, and decode what it says to programs."""
        argv = [f"{SHIM_DIRECTORY}/hako", word, "--json", "--config", str(self.stack.config), self.name]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._sent_at_s = time.time()
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def check(self, line: str, *, since_s: float = 0.0) -> None:
        """See that everything is as it was, for a line that was sent.

        :param since_s: when it could be read first, in seconds since 1970; by default when it was sent.
        """
        answer = self.answer()
        told_s = answer.pop("time")
        assert (since_s or self._sent_at_s) - CLOCK_ERROR_S < told_s < time.time() + CLOCK_ERROR_S
        assert answer == {"pattern": True, "echo": f"{line}\n"}
        assert (self.volume / "file").read_text().endswith(f"{line}\n")


@contextlib.contextmanager
def echo(outside: Space) -> Iterator[None]:
    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1000):
                    connection.sendall(data)

    server = outside.inside(lambda: socket.create_server(("10.1.0.1", PORT)))
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(DEADLINE_S)


@pytest.fixture(scope="module")
def box(one_stack: Stack, templates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    volume = tmp_path_factory.mktemp("volume")
    (volume / "file").touch()
    name = new_id()
    settings = f'park_after_s = {PARK_AFTER_S}\npark_dir = "{tmp_path_factory.mktemp("parked")}"'
    with (
        configured(one_stack, templates=templates, hypervisor=settings),
        new_space() as pod,
        new_space() as outside,
        _census(one_stack),
    ):
        add_cable(pod, outside, "eth0", number=1)
        options = ["--detach", "--null-io", f"--with-ns=network:{pod.path}", *PYTHON_OPTIONS]
        options += ["--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw"]
        started = one_stack.containerd.run(IMAGE, name, "sleep", "100000", options=options)
        try:
            assert started.code == 0, started.stderr
            argv = one_stack.containerd.ctr_argv(
                "task", "exec", "--exec-id", "held", name, *PYTHON, PROGRAM, "10.1.0.1", str(PORT)
            )
            with (
                echo(outside),
                subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
            ):
                try:
                    assert process.stdout is not None
                    assert process.stdout.readline() == "ready\n"
                    yield Box(one_stack, name, volume, process)
                finally:
                    one_stack.containerd.remove(name)
        finally:
            one_stack.containerd.remove(name)


def test_a_parked_sandbox_goes_on_where_it_was(box: Box) -> None:
    box.send("before")
    box.check("before")

    parked = box.command("park")

    box.wait_for(PARKED)
    assert parked.keys() == {"memory_bytes"}
    assert parked["memory_bytes"] > 32 << 20
    assert box.describe().state == "parked"
    assert box.memory_bytes() == 0
    assert box.stack.containerd.tasks()[box.name][1] == "PAUSED"
    for known in ("metrics", "ps"):
        assert box.stack.containerd.ctr("task", known, box.name).code == 0
    box.send("meanwhile")
    assert box.describe().state == "parked", "neither questions nor input wake it"
    time.sleep(3 * CLOCK_ERROR_S)  # a clock that was not set would be late by more than is allowed

    woken_at_s = time.time()
    assert box.command("unpark") == {}
    box.wait_for(AWAKE)

    box.check("meanwhile", since_s=woken_at_s)
    box.send("after")
    box.check("after")
    assert box.stack.containerd.tasks()[box.name][1] == "RUNNING"


def test_a_paused_task_is_parked_after_a_while_and_resumed(box: Box) -> None:
    assert box.stack.containerd.ctr("task", "pause", box.name).code == 0
    box.wait_for(PARKED)
    assert box.memory_bytes() == 0

    assert box.stack.containerd.ctr("task", "resume", box.name).code == 0

    box.send("resumed")
    box.check("resumed")
    assert box.describe().state == "running"


def test_a_task_that_its_annotation_parked_is_killed_and_deleted(
    one_stack: Stack, templates: Path, tmp_path: Path
) -> None:
    containerd, name = one_stack.containerd, new_id()
    park_dir, allowed = f'park_dir = "{tmp_path}"', f'enable_annotations = "{PARK_ANNOTATION}"'
    options = ["--detach", f"--annotation={PARK_ANNOTATION}={PARK_AFTER_S}"]
    with configured(one_stack, templates=templates, hypervisor=park_dir, shim=allowed):
        started = containerd.run(IMAGE, name, "sleep", "100000", options=options)
    try:
        assert started.code == 0, started.stderr
        box = Sandbox(one_stack, name)
        assert containerd.ctr("task", "pause", name).code == 0
        box.wait_for(PARKED)

        assert containerd.ctr("task", "kill", "--signal", "KILL", name).code == 0

        containerd.wait_for_state(name, "STOPPED")
        assert "exit code 137" in containerd.ctr("task", "delete", name).stderr
    finally:
        containerd.remove(name)

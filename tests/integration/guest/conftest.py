"""One virtual machine for the whole directory: a boot costs seconds."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto.kata import agent_pb2
from tests.integration.guest.guest_machine import GuestMachine, process, spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from proto.kata import oci_pb2

IMAGE = Path(os.environ.get("HAKO_GUEST_IMAGE", "/var/lib/hako/guest"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestMachine]:
    machine = GuestMachine(tmp_path_factory.mktemp("guest"), IMAGE, channel="serial")
    try:
        machine.create_sandbox()
        yield machine
    finally:
        machine.close()


class Life:
    """One container, by the calls a shim makes."""

    def __init__(self, machine: GuestMachine, name: str) -> None:
        self.client = machine.client
        self.id = name
        self.created = False

    def create(self, *args: str, terminal: bool = False, **fields: Any) -> None:
        self.create_from(spec(self.id, process(*args, terminal=terminal, **fields)))

    def begin_create(self, *args: str) -> int:
        whole = spec(self.id, process(*args))
        request = agent_pb2.CreateContainerRequest(container_id=self.id, exec_id=self.id, OCI=whole)
        self.created = True
        return self.client.begin("CreateContainer", request)

    def create_from(self, whole: oci_pb2.Spec, **fields: Any) -> None:
        request = agent_pb2.CreateContainerRequest(container_id=self.id, exec_id=self.id, OCI=whole, **fields)
        self.client.call("CreateContainer", request)
        self.created = True

    def start(self) -> None:
        self.client.call("StartContainer", agent_pb2.StartContainerRequest(container_id=self.id))

    def run(self, *args: str, terminal: bool = False) -> None:
        self.create(*args, terminal=terminal)
        self.start()

    def execute(self, exec_id: str, *args: str, terminal: bool = False) -> None:
        request = agent_pb2.ExecProcessRequest(
            container_id=self.id, exec_id=exec_id, process=process(*args, terminal=terminal)
        )
        self.client.call("ExecProcess", request)

    def wait(self, exec_id: str = "") -> int:
        request = agent_pb2.WaitProcessRequest(container_id=self.id, exec_id=exec_id)
        return int(self.client.call("WaitProcess", request).status)

    def read(self, method: str = "ReadStdout", exec_id: str = "", length: int = 32768) -> bytes:
        request = agent_pb2.ReadStreamRequest(container_id=self.id, exec_id=exec_id, len=length)
        return bytes(self.client.call(method, request).data)

    def read_all(self, method: str = "ReadStdout", exec_id: str = "", length: int = 32768) -> bytes:
        return b"".join(iter(lambda: self.read(method, exec_id, length), b""))

    def read_until(self, wanted: bytes, exec_id: str = "") -> bytes:
        seen = b""
        while wanted not in seen:
            part = self.read(exec_id=exec_id)
            assert part, f"the stream ended after {seen!r}"
            seen += part
        return seen

    def read_lines(self, count: int) -> list[str]:
        seen = b""
        while seen.count(b"\n") < count:
            part = self.read()
            assert part, f"the stream ended after {seen!r}"
            seen += part
        return seen.decode().splitlines()

    def write(self, data: bytes, exec_id: str = "") -> None:
        request = agent_pb2.WriteStreamRequest(container_id=self.id, exec_id=exec_id, data=data)
        self.client.call("WriteStdin", request)

    def close_stdin(self, exec_id: str = "") -> None:
        request = agent_pb2.CloseStdinRequest(container_id=self.id, exec_id=exec_id)
        self.client.call("CloseStdin", request)

    def signal(self, number: int, exec_id: str = "") -> None:
        request = agent_pb2.SignalProcessRequest(container_id=self.id, exec_id=exec_id, signal=number)
        self.client.call("SignalProcess", request)

    def resize(self, rows: int, columns: int, exec_id: str = "") -> None:
        request = agent_pb2.TtyWinResizeRequest(
            container_id=self.id, exec_id=exec_id, row=rows, column=columns
        )
        self.client.call("TtyWinResize", request)

    def remove(self) -> None:
        self.client.call("RemoveContainer", agent_pb2.RemoveContainerRequest(container_id=self.id))
        self.created = False


_numbers = itertools.count(1)


@pytest.fixture
def new_container(machine: GuestMachine) -> Iterator[Callable[[], Life]]:
    """Make containers that are removed after the test, in any state."""
    lives: list[Life] = []

    def make() -> Life:
        name = f"c{next(_numbers):03}"
        machine.make_rootfs(name)
        lives.append(Life(machine, name))
        return lives[-1]

    yield make
    for life in lives:
        if life.created:
            life.remove()

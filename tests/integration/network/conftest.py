"""Network namespaces that only their makers know: a pod's, and one with the other ends of its cables."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND_TIMEOUT_S = 10.0


class Space:
    """A network namespace.

    :param path: where it is.
    :param pid: of a process in it.
    """

    def __init__(self, path: Path, *, pid: int = 0) -> None:
        self.path = path
        self.pid = pid

    def run(self, *command: str) -> str:
        """Run a program in it and return what it writes."""
        argv = ["nsenter", f"--net={self.path}", *command]
        return subprocess.run(
            argv, check=True, stdout=subprocess.PIPE, text=True, timeout=COMMAND_TIMEOUT_S
        ).stdout

    def ip(self, command: str) -> str:
        """Run ``ip`` in it."""
        return self.run("ip", *command.split())

    def configuration(self) -> list[str]:
        """List everything that a machine's network may change in it."""
        return [
            *self.ip("-oneline link").splitlines(),
            *self.ip("-oneline address").splitlines(),
            *self.ip("route show table all").splitlines(),
            *self.ip("-6 route show table all").splitlines(),
            *(line for line in self.run("tc", "qdisc").splitlines() if "ingress" in line),
        ]


@contextlib.contextmanager
def new_space() -> Iterator[Space]:
    argv = ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield Space(Path(f"/proc/{holder.pid}/ns/net"), pid=holder.pid)
        finally:
            holder.kill()


@pytest.fixture
def outside() -> Iterator[Space]:
    """What the pod's cables lead to."""
    if shutil.which("nsenter") is None or shutil.which("ip") is None:
        pytest.fail("util-linux and iproute2 are needed; run scripts/setup")
    with new_space() as space:
        yield space


@pytest.fixture
def empty_pod(outside: Space) -> Iterator[Space]:
    """A pod that has no network yet."""
    with new_space() as space:
        space.ip("link set lo up")
        yield space


@pytest.fixture
def pod(empty_pod: Space, outside: Space) -> Space:
    """A pod as CNI leaves it: one cable, both families, a default route."""
    add_cable(empty_pod, outside, "eth0", number=1)
    empty_pod.ip("route add default via 10.1.0.1")
    empty_pod.ip("-6 route add default via fe80::1 dev eth0")
    return empty_pod


def add_cable(pod: Space, outside: Space, name: str, *, number: int, mtu: int = 1400) -> None:
    pod.ip(f"link add {name} mtu {mtu} type veth peer name {name} mtu {mtu} netns {outside.pid}")
    outside.ip(f"addr add 10.{number}.0.1/24 dev {name}")
    outside.ip(f"link set {name} up")
    pod.ip(f"addr add 10.{number}.0.2/24 dev {name}")
    pod.ip(f"addr add fd00:{number}::2/64 dev {name} nodad")
    # Its kernel's own address would appear some time after the rest.
    pod.ip(f"link set {name} addrgenmode none up")
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    # The last thing that the kernel does, a while after the other end of the cable came up.
    while f"multicast ff00::/8 dev {name} " not in pod.ip("-6 route show table all"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def state_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture
def ledger(state_directory: Path) -> Iterator[Ledger]:
    ledger = Ledger(str(state_directory), create=True)
    yield ledger
    ledger.close()

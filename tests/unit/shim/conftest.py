"""containerd's side of the bootstrap: a bundle, flags, the environment, and real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shim import zygote_protocol
from shim.bootstrap import grouping
from shim.host import host_process
from shim.host.host_process import HostProcess
from shim.host.ledger import Ledger
from tests.waiting import WITHIN_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator


PROGRAM = Path(__file__).with_name("shim_with_stub_daemon.py")
ROOT = Path(__file__).parents[3]


@dataclass
class Containerd:
    """Runs the shim as containerd does, in its own temporary directory."""

    directory: Path
    environment: dict[str, str] = field(default_factory=dict)
    containers: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.directory / "containerd.sock")

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    def configure(self, text: str) -> None:
        (self.directory / "config.toml").write_text(text)

    def bundle(self, container: str) -> Path:
        return self.directory / "bundles" / container

    def make_bundle(self, container: str, *, annotations: dict[str, str] | None = None) -> Path:
        bundle = self.bundle(container)
        bundle.mkdir(parents=True)
        os.mkfifo(bundle / "log")
        (bundle / "config.json").write_text(json.dumps({"annotations": annotations or {}}))
        self.containers.append(container)
        return bundle

    def run(
        self,
        action: str,
        container: str,
        *,
        stdin: bytes = b"",
        flags: tuple[str, ...] = (),
        namespace: str = "tests",
        publish_binary: str = "/usr/bin/containerd",
    ) -> subprocess.CompletedProcess[bytes]:
        given = ["-namespace", namespace, "-address", self.address]
        given += ["-publish-binary", publish_binary, "-id", container]
        if action == "delete":
            given += ["-bundle", str(self.bundle(container))]
        return subprocess.run(
            [sys.executable, str(PROGRAM), *given, *flags, action],
            cwd=self.bundle(container),
            env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)},
            input=stdin,
            capture_output=True,
            timeout=WITHIN_S,
            check=False,
        )

    def delete_without_bundle(self, container: str) -> subprocess.CompletedProcess[bytes]:
        """Run ``delete`` without a bundle's name, in a bundle that is removed before the program starts."""
        given = ["-namespace", "tests", "-address", self.address, "-id", container, "delete"]
        bundle = self.bundle(container)
        return subprocess.run(
            ["/bin/sh", "-c", 'rm -r "$0" && exec "$@"', bundle, sys.executable, str(PROGRAM), *given],
            cwd=bundle,
            env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WITHIN_S,
            check=False,
        )

    def socket_path(self, group: str, *, directory: Path = Path("/run/containerd/s")) -> Path:
        return directory / grouping.socket_name(address=self.address, namespace="tests", group=group)

    def state_of(self, group: str) -> Path:
        return self.state_dir / self.socket_path(group).name[:16]

    def daemon(self, group: str) -> dict[str, Any]:
        """Wait until the daemon of a group has reported what it was given."""
        reader = os.open(self.bundle(group) / "log", os.O_RDONLY)
        try:
            said = b""
            while b"the daemon runs" not in said:
                said += os.read(reader, 4096)
        finally:
            os.close(reader)
        seen: dict[str, Any] = json.loads((self.state_of(group) / "seen.json").read_text())
        return seen

    def shims(self) -> list[HostProcess]:
        """Return every shim process in a ledger."""
        found = []
        for path in self.state_dir.glob("*/ledger"):
            with contextlib.closing(Ledger(str(path.parent))) as ledger:
                found += [entry for entry in ledger.entries() if entry.kind == "process"]
        return [HostProcess(pid=entry.pid, start_time=entry.start_time) for entry in found]

    def kill_shims(self) -> None:
        assert host_process.end(self.shims(), number=signal.SIGKILL, timeout_s=WITHIN_S) == []

    def end_all(self) -> None:
        self.kill_shims()
        for container in self.containers:
            self.socket_path(container).unlink(missing_ok=True)


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[Containerd]:
    if os.geteuid() != 0:
        pytest.skip("start refuses to run without root")
    environment = {"HAKO_CONFIG": str(tmp_path / "config.toml"), "STUB_LOG_DIR": f"{tmp_path}-log"}
    peer = Containerd(tmp_path, {"MAX_SHIM_VERSION": "2", **environment})
    peer.configure(f'[shim]\nzygote = false\nstate_dir = "{peer.state_dir}"\n')
    yield peer
    peer.end_all()


def place(containerd: Containerd) -> Path:
    """Return the directory of its zygote's socket."""
    return Path(zygote_protocol.socket_path(identity_of(containerd)))


def identity_of(containerd: Containerd) -> str:
    """Return the identity that tells its zygote from others."""
    return f"{sys.executable}\n{PROGRAM}\n{zygote_protocol.__file__}\n{containerd.address}"


def zygote_socket(containerd: Containerd) -> Path:
    """Wait until a zygote serves."""
    path = place(containerd)
    until(path.is_socket)
    return path


def lock_holder(path: Path) -> int:
    """Return the zygote's pid: only its newest fork may have the lock's file open, too, for a moment."""
    holders = []
    for link in Path("/proc").glob("[0-9]*/fd/3"):
        with contextlib.suppress(OSError):  # it has ended
            if str(link.readlink()) == f"{path}.lock":
                holders.append(int(link.parts[2]))
    for pid in holders:
        with contextlib.suppress(OSError):
            if parent(pid) not in holders:
                return pid
    raise LookupError(f"nobody holds {path}.lock")


def parent(pid: int) -> int:
    """Return the id of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def end(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    assert host_process.end([host_process.identify(pid)], number=signal.SIGKILL, timeout_s=WITHIN_S) == []


@pytest.fixture
def warmed(containerd: Containerd) -> Iterator[Containerd]:
    """A containerd whose next shims a zygote forks; the start of ``c1`` also started the zygote."""
    containerd.configure(f'[shim]\nzygote = true\nstate_dir = "{containerd.state_dir}"\n')
    containerd.environment["STUB_ACCEPTED_WITHIN_S"] = str(WITHIN_S)
    containerd.make_bundle("c1")
    containerd.run("start", "c1")
    zygote = host_process.identify(lock_holder(zygote_socket(containerd)))
    yield containerd
    assert host_process.end([zygote], number=signal.SIGKILL, timeout_s=WITHIN_S) == []
    for path in (place(containerd), Path(f"{place(containerd)}.lock")):
        path.unlink(missing_ok=True)


@pytest.fixture(params=["anew", "forked"])
def either(request: pytest.FixtureRequest) -> Containerd:
    """Two containerds: one starts each shim anew, the other's shims are forked by a zygote."""
    found: Containerd = request.getfixturevalue("containerd" if request.param == "anew" else "warmed")
    return found

"""Every containerd behind its runtime interface, pods that many tests share, and a census around each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cri import image
from tests.cri.pods import Container, Pod, remove_all, run_pod
from tests.cri.stack import Kind, Stack, opened_stack
from tests.e2e import census
from tests.e2e.containerd import RELEASES
from tests.e2e.nursery import Nursery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
PORT = 7000
KINDS = [
    *(Kind(release=release, sandboxer="podsandbox") for release in RELEASES),
    Kind(release=RELEASES[-1], sandboxer="shim"),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the same tests run under the runtime that Hako is compared with."""
    parser.addoption("--handler", default="runc", choices=["hako", "runc"], help="what runs the tests' pods")


@pytest.fixture(scope="package")
def private_mounts() -> Iterator[None]:
    """Give the tests a mount namespace of their own while they run, so that every mount in it is theirs.

    Its root is shared, as on a host with systemd. What others mount for a while is out of sight, so that
    its end is not taken for a loss.
    """
    libc, here = ctypes.CDLL(None, use_errno=True), Path.cwd()
    with Path("/proc/thread-self/ns/mnt").open("rb") as before:
        if libc.unshare(CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare: a mount namespace: the tests need root")
        private = ("/run/containerd", "/run/hako", "/run/netns", "/var/lib/cni")
        for directory in private:
            Path(directory).mkdir(parents=True, exist_ok=True)
        subprocess.run(["/usr/bin/mount", "--make-rprivate", "/"], check=True)
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        for point in reversed([line.split()[4] for line in mounts]):
            if point.startswith(("/run/netns/", "/tmp/")):
                subprocess.run(["/usr/bin/umount", "--lazy", point], check=True)
        for directory in private:
            argv = ["/usr/bin/mount", "-t", "tmpfs", "hako-cri", directory]
            subprocess.run(argv, check=True)
        subprocess.run(["/usr/bin/mount", "--make-rshared", "/"], check=True)
        for directory in census.SHARED_DIRECTORIES:
            directory.mkdir(mode=0o700, exist_ok=True)
        yield
        # A thread may change to another mount namespace only while it shares its root with no other one.
        if libc.unshare(CLONE_FS) != 0 or libc.setns(before.fileno(), CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "setns: the mounts from before the tests")
        os.chdir(here)


@pytest.fixture(scope="package")
def home(private_mounts: None) -> Iterator[Path]:
    """A directory with a path short enough for the sockets below it."""
    with tempfile.TemporaryDirectory(prefix="hako-cri-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="package")
def nursery(private_mounts: None) -> Iterator[Nursery]:
    """The ancestor of every process that the tests start through containerd."""
    with Nursery() as opened:
        yield opened


@pytest.fixture(scope="package")
def archives(home: Path) -> list[Path]:
    """The images, ready to be imported."""
    return image.write_images(home)


@pytest.fixture(scope="package", params=KINDS, ids=str)
def stack(
    request: pytest.FixtureRequest, home: Path, nursery: Nursery, archives: list[Path]
) -> Iterator[Stack]:
    """Each containerd, and each way in which it can have its pods run."""
    kind, handler = request.param, request.config.getoption("--handler")
    if kind.sandboxer == "shim" and handler == "runc":
        pytest.skip("runc's shim has no Sandbox API")
    with opened_stack(home, nursery, archives, kind=kind, handler=handler) as opened:
        yield opened


@contextlib.contextmanager
def counted(stack: Stack) -> Iterator[None]:
    """See that nothing is left when a block is over."""
    before = stack.census()
    yield
    changes = stack.difference(before)
    assert not changes, "\n".join(["left behind, or taken away:", *changes])


@pytest.fixture(autouse=True)
def containerd_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show what containerd logged during a test, if the test fails."""
    if "stack" not in request.fixturenames:
        yield
        return
    found: Stack = request.getfixturevalue("stack")
    log = found.containerd.log
    start = log.stat().st_size
    try:
        yield
    finally:
        with log.open("rb") as opened:
            opened.seek(start)
            print(opened.read().decode(errors="replace")[-20000:])


@pytest.fixture
def new_pod(stack: Stack) -> Iterator[Callable[[str], Pod]]:
    """Run pods, which are removed after the test, and see that nothing is left of them."""
    pods: list[Pod] = []

    def make(name: str) -> Pod:
        pods.append(run_pod(stack, name))
        return pods[-1]

    with counted(stack):
        try:
            yield make
        finally:
            remove_all(pods)


@dataclass(frozen=True, slots=True)
class Duo:
    """A pod with a server and a worker beside it, and another pod on the same bridge."""

    pod: Pod
    server: Container
    worker: Container
    neighbour: Pod
    caller: Container


@pytest.fixture(scope="package")
def duo(stack: Stack) -> Iterator[Duo]:
    """Two pods that many tests share; nothing is left of them at the end."""
    pods: list[Pod] = []
    with counted(stack):
        try:
            pods.append(run_pod(stack, "duo"))
            server = pods[0].run("server", *image.PEER_COMMAND, "serve", str(PORT))
            worker = pods[0].run("worker", "sh", "-c", "echo ready; exec sleep 100000")
            pods.append(run_pod(stack, "neighbour"))
            caller = pods[1].run("caller", "sleep", "100000")
            server.wait_for_line("serving")
            yield Duo(pods[0], server, worker, pods[1], caller)
        finally:
            remove_all(pods)

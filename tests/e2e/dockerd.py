"""A private dockerd beside a containerd of the tests, and the ``docker`` commands that talk to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts import docker as docker_programs
from tests.e2e import busybox
from tests.e2e.containerd import CALL_TIMEOUT_S, NAMESPACE, SYSTEM_PATH, Result
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

IMAGE = "box"


@dataclass(frozen=True, slots=True, kw_only=True)
class Docker:
    """A dockerd that serves.

    :param client: the program ``docker``.
    :param socket: where dockerd serves.
    :param runtime: of the containers that :meth:`run` starts.
    :param home: a directory for its client.
    """

    client: Path
    socket: Path
    runtime: str
    home: Path

    def __call__(self, *arguments: str | Path, stdin: bytes = b"") -> Result:
        """Run ``docker`` to its end.

        :raises subprocess.TimeoutExpired: if it does not end.
        """
        done = subprocess.run(
            [self.client, "--host", f"unix://{self.socket}", *arguments],
            input=stdin,
            capture_output=True,
            timeout=CALL_TIMEOUT_S,
            check=False,
            env={"PATH": SYSTEM_PATH, "HOME": str(self.home)},
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def tell(self, *arguments: str | Path, stdin: bytes = b"") -> str:
        """Run ``docker``, which must succeed, and return its output."""
        done = self(*arguments, stdin=stdin)
        assert done.code == 0, (arguments, done)
        return done.stdout.strip()

    def run(self, *arguments: str | Path, stdin: bytes = b"") -> Result:
        """Run ``docker run`` with the runtime that is tested."""
        return self("run", "--runtime", self.runtime, *arguments, stdin=stdin)

    def start(self, *arguments: str | Path) -> str:
        """Start a container that stays, and return its id."""
        return self.tell("run", "--detach", "--runtime", self.runtime, *arguments)

    def look(self, container: str, template: str) -> str:
        """Return a part of what ``docker inspect`` tells."""
        return self.tell("inspect", "--format", template, container)


@contextlib.contextmanager
def running(stack: Stack, home: Path, *, release: str, runtime: str) -> Iterator[Docker]:
    """Keep a dockerd running for a block; it has an image, :data:`IMAGE`.

    :param stack: whose containerd it uses.
    :param home: an empty directory with a short path.
    :param release: one of ``scripts.docker.RELEASES``.
    :param runtime: of its containers.
    """
    programs = docker_programs.programs(release)
    docker = Docker(client=programs.client, socket=home / "sock", runtime=runtime, home=home)
    containerd, daemons = stack.containerd, programs.daemons
    argv: list[str | Path] = [
        *(daemons / "dockerd", "--containerd", containerd.address, "--containerd-namespace", NAMESPACE),
        *("--host", f"unix://{docker.socket}", "--data-root", home / "root", "--exec-root", home / "exec"),
        *("--pidfile", home / "pid", "--config-file", home / "none.json", "--cgroup-parent", f"/{NAMESPACE}"),
        *("--exec-opt", "native.cgroupdriver=cgroupfs", "--userland-proxy-path", daemons / "docker-proxy"),
        *("--init-path", programs.init, "--ip6tables=false"),
    ]
    (home / "none.json").write_text("{}", encoding="ascii")
    log = home / "log"
    pid = containerd.nursery.spawn(
        argv,
        environment={
            "PATH": f"{daemons}:{containerd.release.programs}:{SYSTEM_PATH}",
            "HOME": str(home),
        },
        directory=home,
        stdout=log,
        stderr=log,
    )
    try:
        _wait_until_it_serves(docker, log)
        docker.tell("import", "-", IMAGE, stdin=busybox.rootfs_archive())
        yield docker
    finally:
        os.kill(pid, signal.SIGTERM)
        containerd.nursery.wait(pid, timeout_s=patient(60))


def _wait_until_it_serves(docker: Docker, log: Path) -> None:
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(docker.socket)) == 0 and docker("version").code == 0:
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"dockerd does not serve: {log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.1)

"""A private containerd: its own root, state, sockets and configuration, started and stopped by process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.e2e.nursery import Nursery

NAMESPACE = f"hako-e2e-{os.getpid()}"
"""Also the cgroup above those of the containers: no two lanes have the same."""
CGROUPS = Path("/sys/fs/cgroup")
LOG_SHOWN = 8000  # characters
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHIM_DIRECTORY = Path(sys.executable).parent
CALL_TIMEOUT_S = patient(60.0) + 60.0
"""Longer than a machine may take that waits a minute for its turn, is no clone in the end, and boots."""
ATTEMPTS_OF_RUNC = 4
"""On a busy host, the output of a short process under runc may be lost: it may have ended before ctr and
runc's shim have opened its streams, and then they no longer do."""
TIMEOUTS_S = {"shim.cleanup": 5, "shim.load": 5, "shim.shutdown": 3, "task.state": 2}
"""How long containerd usually waits for a shim's ``delete``, for a connection to it, its end, and a state."""

UNNEEDED_PLUGINS = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One containerd that the machine has: where its programs are and which configuration it reads."""

    name: str
    programs: Path
    config_version: int


RELEASES = (
    Release(name="1.6", programs=Path("/usr/bin"), config_version=2),
    Release(name="1.7", programs=Path("/var/cache/hako/containerd-1.7/usr/bin"), config_version=2),
    Release(name="2.1", programs=Path("/var/cache/hako/containerd-2.1/usr/bin"), config_version=3),
)


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a command: its exit code and its two outputs."""

    code: int
    stdout: str
    stderr: str


def converse(argv: Sequence[str], *, timeout_s: float = CALL_TIMEOUT_S) -> int:
    """Run ``cat`` in a container; check that it echoes its input and ends with it.

    The end of the input waits for the echo: some ctr forget an end that comes before the process exists.

    :param argv: a ``ctr`` command line that runs ``cat``.
    :returns: its exit code.
    :raises AssertionError: if something else comes back.
    """
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("first\n")
        process.stdin.flush()
        assert process.stdout.readline() == "first\n"
        process.stdin.write("last without newline")
        process.stdin.close()
        assert process.stdout.read() == "last without newline"
        return process.wait(timeout_s)


@dataclass(slots=True, kw_only=True)
class Containerd:
    """A daemon below ``home``, and the ``ctr`` commands that talk to it.

    ``launcher`` is a command that executes the one after it.
    """

    release: Release
    home: Path
    nursery: Nursery
    environment: Mapping[str, str]
    runtime: str
    namespace: str = NAMESPACE
    launcher: tuple[str, ...] = ()
    pid: int = field(default=0, init=False)
    _is_stopped: bool = field(default=False, init=False)

    @property
    def address(self) -> Path:
        """The socket of the daemon's gRPC service."""
        return self.home / "containerd.sock"

    @property
    def state(self) -> Path:
        """The directory of the bundles."""
        return self.home / "state"

    @property
    def root(self) -> Path:
        """The directory of what lasts: images, snapshots, metadata."""
        return self.home / "root"

    @property
    def log(self) -> Path:
        """The output of the daemon and, through it, of every shim."""
        return self.home / "containerd.log"

    def configuration(self, *, unneeded: Sequence[str] = UNNEEDED_PLUGINS) -> str:
        """Return the text of the daemon's configuration file.

        :param unneeded: the plugins that it leaves out.
        """
        is_traced = any(name.startswith("OTEL_") for name in self.environment)
        left_out = [plugin for plugin in unneeded if not (is_traced and ".tracing" in plugin)]
        plugins = ", ".join(f'"{plugin}"' for plugin in left_out)
        return (
            f"version = {self.release.config_version}\n"
            f'root = "{self.root}"\nstate = "{self.state}"\n'
            f"disabled_plugins = [{plugins}]\n"
            f'[grpc]\naddress = "{self.address}"\n'
            f'[ttrpc]\naddress = "{self.address}.ttrpc"\n'
            '[debug]\nlevel = "info"\n'
            "[timeouts]\n"
            + "".join(f'"io.containerd.timeout.{of}" = "{patient(s):.0f}s"\n' for of, s in TIMEOUTS_S.items())
        )

    def start(self) -> None:
        """Start the daemon and wait until it serves.

        :raises RuntimeError: if it ends or does not serve in time.
        """
        config = self.home / "containerd.toml"
        config.write_text(self.configuration(), encoding="utf-8")
        self.pid = self.nursery.spawn(
            [*self.launcher, self.release.programs / "containerd", "--config", config],
            environment={
                **self.environment,
                "PATH": f"{self.release.programs}:{SHIM_DIRECTORY}:{SYSTEM_PATH}",
                "HOME": "/",
            },
            directory=self.home,
            stdout=self.log,
            stderr=self.log,
        )
        self._is_stopped = False
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while not self._serves():
            if time.monotonic() > deadline:
                raise RuntimeError(f"containerd {self.release.name}: does not serve; its log is {self.log}")
            time.sleep(0.02)

    def _serves(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.address)) != 0:
                return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.ctr("version", timeout_s=patient(10)).code == 0
        return False

    def stop(self, *, how: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon, if it runs, and wait until it is gone; shims live on.

        :param how: the signal that ends it.
        """
        if not self.pid or self._is_stopped:
            return
        os.kill(self.pid, how)
        self.nursery.wait(self.pid, timeout_s=patient(60))
        self._is_stopped = True

    def revive(self) -> None:
        """Start the daemon again if a test has failed while it was stopped."""
        if self._is_stopped:
            self.start()

    def ctr(
        self, *arguments: str | Path, timeout_s: float = CALL_TIMEOUT_S, stdin: str | None = None
    ) -> Result:
        """Run ``ctr`` to its end.

        :param arguments: what follows the address and the namespace.
        :param timeout_s: how long it may take.
        :param stdin: its input, or None for an empty one.
        :raises subprocess.TimeoutExpired: if it takes longer.
        """
        return self._finish(self.ctr_argv(*arguments), stdin=stdin, timeout_s=timeout_s)

    def _finish(self, argv: Sequence[str], *, stdin: str | None, timeout_s: float) -> Result:
        try:
            done = subprocess.run(
                argv, input=stdin or "", capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            log = self.log.read_text(errors="replace")[-LOG_SHOWN:]
            error.add_note(f"containerd's log, with those of its shims, ends so:\n{log}")
            raise
        return Result(done.returncode, done.stdout, done.stderr)

    def ctr_argv(self, *arguments: str | Path) -> list[str]:
        """Return the ``ctr`` command line for this daemon."""
        programs = self.release.programs
        return [
            str(programs / "ctr"),
            "--address",
            str(self.address),
            "--namespace",
            self.namespace,
            *map(str, arguments),
        ]

    def run_argv(
        self, image: str, container: str, *command: str, options: Sequence[str | Path] = ()
    ) -> list[str]:
        """Return the ``ctr run`` command line of a container under the runtime that is tested."""
        return self.ctr_argv("run", "--runtime", self.runtime, *options, image, container, *command)

    def run(
        self,
        image: str,
        container: str,
        *command: str,
        options: Sequence[str | Path] = ("--rm",),
        stdin: str | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Result:
        """Run ``ctr run`` to its end.

        :param image: the image's name.
        :param container: the container's id.
        :param command: the process, or nothing for the image's own.
        :param options: further options of ``ctr run``.
        :param stdin: what the process reads.
        :param timeout_s: how long it may take.
        :raises subprocess.TimeoutExpired: if it takes longer.
        """
        argv = self.run_argv(image, container, *command, options=options)
        return self._finish(argv, stdin=stdin, timeout_s=timeout_s)

    def exec(self, container: str, exec_id: str, *command: str, stdin: str | None = None) -> Result:
        """Run ``ctr task exec`` to its end."""
        return self.ctr("task", "exec", "--exec-id", exec_id, container, *command, stdin=stdin)

    def ask(self, container: str, exec_id: str, *command: str, timeout_s: float = CALL_TIMEOUT_S) -> Result:
        """Run a command that only looks, and says something, as :meth:`exec` does.

        :param timeout_s: how long it may take.
        """
        argv = ("task", "exec", "--exec-id", exec_id, container, *command)
        for _ in range(ATTEMPTS_OF_RUNC if ".runc." in self.runtime else 1):
            result = self.ctr(*argv, timeout_s=timeout_s)
            if result.code != 0 or result.stdout:
                break
        return result

    def tasks(self) -> dict[str, tuple[int, str]]:
        """Return every task of the namespace with its process id and state.

        Those whose state containerd does not know are asked about again: it waits two seconds for a shim.
        """
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            listed = self._listed_tasks()
            if "UNKNOWN" not in {state for _, state in listed.values()} or time.monotonic() > deadline:
                return listed

    def _listed_tasks(self) -> dict[str, tuple[int, str]]:
        listed = self.ctr("task", "ls")
        assert listed.code == 0, listed.stderr
        table = [line.split() for line in listed.stdout.splitlines()[1:]]
        return {name: (int(pid), state) for name, pid, state in table}

    def containers(self) -> list[str]:
        """Return the id of every container of the namespace."""
        listed = self.ctr("container", "ls", "-q")
        assert listed.code == 0, listed.stderr
        return listed.stdout.split()

    def wait_for_state(self, container: str, state: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Wait until a task has a state.

        :raises TimeoutError: if it has another one at the deadline.
        """
        deadline = time.monotonic() + timeout_s
        while (seen := self._listed_tasks().get(container, (0, "GONE"))[1]) != state:
            if time.monotonic() > deadline:
                raise TimeoutError(f"task {container}: is {seen}, not {state}")
            time.sleep(0.05)

    def remove(self, container: str) -> None:
        """Kill and delete a container and its task, in any state.

        A task whose shim has just died cannot be deleted, nor its container, until containerd has noticed.
        """
        self.revive()
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            if container in self._listed_tasks():
                self.ctr("task", "kill", "--signal", "9", "--all", container)
                with contextlib.suppress(TimeoutError):
                    self.wait_for_state(container, "STOPPED", timeout_s=patient(10))
                self.ctr("task", "delete", "--force", container)
            deleted = self.ctr("container", "delete", container)
            if deleted.code == 0 or container not in self.containers() or time.monotonic() > deadline:
                return


@contextlib.contextmanager
def running(daemon: Containerd) -> Iterator[Containerd]:
    """Keep a daemon running for a block."""
    daemon.home.mkdir(parents=True, exist_ok=True)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()
        for zygote in list(daemon.nursery.zygotes(daemon.address)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(zygote.pid, signal.SIGKILL)
        for shared in (CGROUPS / NAMESPACE, *CGROUPS.glob(f"*/{NAMESPACE}")):
            with contextlib.suppress(OSError):  # not there, or another daemon's containers are in it
                shared.rmdir()

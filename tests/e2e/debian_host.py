"""A Debian host for the package: a root, processes, a network without a way out, and a containerd.

Its root lies over one that ``scripts.debian.root`` makes. All that is written goes to the upper layer, so
that a test can tell what the package has left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.containerd import CGROUPS, NAMESPACE, SYSTEM_PATH, Result
from tests.e2e.nursery import descendants
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TIMEOUT_S = patient(120.0)
FILES = "/srv/test"
"""Where the files of the test are in the host."""

# The first process of the host reaps what shims leave, as any init does.
_INIT = (
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True)\n"
    "while True: signal.pause()"
)
_SETUP = """
set -e
root=$1; lower=$2; layers=$3
mount -t overlay -o "lowerdir=$lower,upperdir=$layers/upper,workdir=$layers/work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/var/lib/containerd"
mount -t tmpfs tmpfs "$root/var/lib/containerd"
ip link set lo up
cd "$root"
pivot_root . .
umount -l .
mount --make-rshared /
exec chroot . /usr/bin/python3 -ISc "$4"
"""
#: What the package manager notes, and directories that have a file system of their own.
_NOTES = (
    *("var/lib/dpkg", "var/log", "var/cache", "etc/ld.so.cache", "usr/share/man", FILES.lstrip("/")),
    *("proc", "sys", "dev", "run", "tmp", "var/lib/containerd", "srv"),
    *("etc/cni", "opt/cni", "opt/containerd"),  # containerd makes them
)
_HAKO_NOTES = ("var/lib/dpkg/info/hako", "var/log/hako", "var/cache/hako")


@dataclass(kw_only=True)
class DebianHost:
    """A host that runs.

    :param pid: of its first process, as seen from outside.
    :param lower: the directory that its root was made of.
    :param upper: the directory of what has been written to its root.
    """

    pid: int
    lower: Path
    upper: Path
    _containerd: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def argv(self, *command: str) -> list[str]:
        """Return a command line that runs a command in the host."""
        enter = ["/usr/bin/nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts"]
        return [*enter, "/usr/bin/env", "-i", f"PATH={SYSTEM_PATH}", "HOME=/root", *command]

    def run(self, *command: str, timeout_s: float = _TIMEOUT_S) -> Result:
        """Run a command to its end.

        :raises subprocess.TimeoutExpired: if it takes longer.
        """
        done = subprocess.run(
            self.argv(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        print("#", *command, f"-> {done.returncode}\n{done.stdout}{done.stderr}")  # shown if the test fails
        return Result(done.returncode, done.stdout, done.stderr)

    def do(self, *command: str, timeout_s: float = _TIMEOUT_S) -> str:
        """Run a command that must succeed.

        :returns: what it wrote to standard output.
        """
        result = self.run(*command, timeout_s=timeout_s)
        assert result.code == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def ctr(self, *arguments: str) -> list[str]:
        """Return a ``ctr`` command."""
        return ["ctr", "--namespace", NAMESPACE, *arguments]

    def start_containerd(self) -> None:
        """Start the host's containerd by its own configuration, and wait until it serves.

        :raises RuntimeError: if it ends or does not serve in time.
        """
        script = "exec containerd >>/var/log/containerd.log 2>&1"
        self._containerd = subprocess.Popen(self.argv("/bin/sh", "-c", script))
        deadline = time.monotonic() + _TIMEOUT_S
        while self.run(*self.ctr("version")).code != 0:
            if time.monotonic() > deadline or self._containerd.poll() is not None:
                raise RuntimeError(self.run("cat", "/var/log/containerd.log").stdout)
            time.sleep(0.2)

    def wait_for_containerd(self) -> None:
        """Wait until containerd is gone, which ends with the host."""
        if self._containerd is not None:
            self._containerd.wait(_TIMEOUT_S)

    def processes(self) -> dict[int, str]:
        """Return the command lines of the host's processes, but for its first one and containerd.

        The process ids are those that are seen from outside.
        """
        ancestors = [self.pid, *([self._containerd.pid] if self._containerd else [])]
        found = {each.pid: each.command for ancestor in ancestors for each in descendants(ancestor)}
        return {pid: command for pid, command in found.items() if command != "containerd"}

    def names(self, directory: str) -> set[str]:
        """Return the names in a directory; none if it is not there."""
        return set(self.run("ls", "-A", directory).stdout.split())

    def written(self) -> set[str]:
        """Return the paths that were written to the root, but for the package manager's own notes."""
        found = set()
        for directory, _, files in os.walk(self.upper):
            below = Path(directory).relative_to(self.upper)
            found |= {str(below / name) for name in files}
            if not (self.lower / below).is_dir():
                found.add(str(below))
        return {
            path
            for path in found
            if not any(path == note or path.startswith(f"{note}/") for note in _NOTES)
            or path.startswith(_HAKO_NOTES)
        }

    def received(self, text: bytes) -> bool:
        """Tell whether a trace with a text has been posted to the test's collector."""
        traces = (self.upper / FILES.lstrip("/")).glob("*.trace")
        return any(text in path.read_bytes() for path in traces)

    def mounts(self) -> list[str]:
        """Return the mount points."""
        return [line.split()[4] for line in self.do("cat", "/proc/1/mountinfo").splitlines()]

    @staticmethod
    def cgroups() -> list[str]:
        """Return the control groups of the containers."""
        return [path for path, _, _ in os.walk(CGROUPS) if f"/{NAMESPACE}/" in path]


@contextlib.contextmanager
def running(lower: Path, place: Path, *, files: Sequence[Path] = ()) -> Iterator[DebianHost]:
    """Keep a host running for a block; then nothing is left of it.

    :param lower: its root, which is not changed.
    :param place: a directory for what is written.
    :param files: what lies in :data:`FILES`.
    """
    root = place / "root"
    for path in (root, place / "upper" / FILES.lstrip("/"), place / "work"):
        path.mkdir(parents=True)
    for file in files:
        shutil.copy(file, place / "upper" / FILES.lstrip("/"))
    unshare = ["/usr/bin/unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--propagation", "private"]
    setup = ["/bin/sh", "-c", _SETUP, "setup", str(root), str(lower), str(place), _INIT]
    with subprocess.Popen(
        [*unshare, "--fork", "--kill-child", *setup], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        ending = contextlib.ExitStack()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            [pid] = map(
                int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("ascii").split()
            )
            host = DebianHost(pid=pid, lower=lower, upper=place / "upper")
            ending.callback(host.wait_for_containerd)
            yield host
        finally:
            process.kill()
            process.wait(_TIMEOUT_S)
            ending.close()
            _remove_cgroups()
    shutil.rmtree(place)


def _remove_cgroups() -> None:
    """Remove those of containers that ended with their host, once their processes are gone."""
    deadline = time.monotonic() + _TIMEOUT_S
    containers = map(Path, reversed(DebianHost.cgroups()))
    for path in (*containers, *CGROUPS.glob(NAMESPACE), *CGROUPS.glob(f"*/{NAMESPACE}")):
        while path.exists():
            try:
                path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

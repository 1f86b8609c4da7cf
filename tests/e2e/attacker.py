"""A container with every privilege that enters its machine, and files of the host that it was not given."""

from __future__ import annotations

import json
import secrets
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from shim.agent.guest_names import agent_id
from tests.e2e.by_hand import PROCESS, ByHand
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Stack

# fmt: off
CAPABILITIES = (
    "CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER",
    "CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_KILL", "CAP_LEASE", "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST", "CAP_NET_RAW", "CAP_PERFMON", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
    "CAP_SETUID", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_SYS_MODULE",
    "CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM",
)
# fmt: on
PRIVILEGED = {"resources": {"devices": [{"allow": True, "access": "rwm"}]}}
MARK = "hako-sentinel-"
SHARE = "/run/kata-containers/shared/containers"
VOLUMES = "/run/kata-containers/sandbox/volumes"
GUEST = "/guest"
# Functions for the programs that run in the machine.
ATTEMPTS = """
import errno, os

def attempt(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        print(call.__name__, errno.errorcode[error.errno])
    else:
        print(call.__name__, "done")

def make_everything_in(directory):
    attempt(os.mkdir, directory + "/directory")
    attempt(os.symlink, "/etc", directory + "/link")
    for kind in (0o100000, 0o010000, 0o140000, 0o060000, 0o020000):
        attempt(os.mknod, directory + "/node", kind | 0o6777, os.makedev(8, 0))
    attempt(os.open, directory + "/file-made", os.O_CREAT | os.O_WRONLY)

def spoil(path):
    attempt(os.rename, path, path + "-renamed")
    attempt(os.rmdir if os.path.isdir(path) else os.unlink, path)
    attempt(os.chmod, path, 0o6777)
    attempt(os.chown, path, 1, 1)
    attempt(os.utime, path)
    attempt(os.setxattr, path, "security.capability", bytes.fromhex("01000002000400" + "00" * 13))
    for name in ("user.x", "trusted.x", "trusted.overlay.opaque", "trusted.overlay.redirect"):
        attempt(os.setxattr, path, name, b"y")
    if not os.path.isdir(path):
        attempt(os.truncate, path, 0)
        attempt(os.open, path, os.O_WRONLY)
        attempt(os.link, path, path + "-hard")
"""


@dataclass(frozen=True, slots=True)
class Sentinel:
    """A file that no container was given: its content and its attributes."""

    path: Path
    content: bytes
    status: tuple[int, ...]

    @classmethod
    def plant(cls, path: Path) -> Sentinel:
        """Make one."""
        path.write_text(f"{MARK}{secrets.token_hex(16)}\n")
        return cls(path, path.read_bytes(), cls._status(path))

    def assert_untouched(self) -> None:
        """Compare it with its original state."""
        assert (self.path.read_bytes(), self._status(self.path)) == (self.content, self.status), self.path

    @staticmethod
    def _status(path: Path) -> tuple[int, ...]:
        status = path.lstat()
        return (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            status.st_ino,
            status.st_mtime_ns,
        )


@dataclass(slots=True)
class Attacker:
    """A hostile container, and the host around it.

    :param box: the container.
    :param place: the directory on the host with everything that is shared, and with files that are not.
    :param sentinels: those files.
    :param said: everything that an attempt has printed.
    """

    box: ByHand
    place: Path
    sentinels: list[Sentinel]
    said: list[str] = field(default_factory=list)

    @property
    def prey(self) -> str:
        """The path on the host of a file that lies next to the shared directories."""
        return str(self.sentinels[0].path)

    def run(self, script: str) -> str:
        """Run a shell script in the container and return all it printed, even if it failed."""
        said = self.box.output("sh", "-c", f"exec 2>&1\n{script}\ntrue")
        self.said.append(said)
        return said

    def run_as_guest(self, script: str) -> str:
        """Run a shell script as root of the machine, where its first process has its files."""
        root = f"{SHARE}/{agent_id(self.box.id)}/rootfs"
        programs = f"{root}/bin"
        enter = f"PATH={programs}:/usr/bin S={SHARE} V={VOLUMES} ME={root}; cd /; exec 2>&1"
        shell = [f"{programs}/sh", "-c", f"export {enter}\n{script}\ntrue"]
        said = self.box.output("nsenter", f"--mount={GUEST}/1/ns/mnt", *shell)
        self.said.append(said)
        return said

    def run_python(self, program: str) -> dict[str, set[str]]:
        """Run a program as root of the machine, after :data:`ATTEMPTS`.

        :returns: what became of each kind of system call that it tried: names of errors, or ``done``.
        """
        script = self.place / "hostile" / "rootfs" / "attempt.py"
        script.write_text(
            f"box = {agent_id(self.box.id)!r}\n{ATTEMPTS}\n{textwrap.dedent(program)}", encoding="utf-8"
        )
        said = self.run_as_guest("/usr/bin/python3.11 -ISB $ME/attempt.py && echo ended")
        assert said.endswith("ended\n"), said
        outcomes: dict[str, set[str]] = {}
        for line in said.splitlines()[:-1]:
            call, outcome = line.split()
            outcomes.setdefault(call, set()).add(outcome)
        return outcomes

    def create(self, source: Path) -> str:
        """Have the shim create a container with a volume in the same machine, and delete it.

        :param source: the volume's path on the host.
        :returns: what the machine sees in the volume, or why the shim refused it.
        """
        name = new_id()
        bundle = self.place / "bundles" / name
        (bundle / "rootfs").mkdir(parents=True)
        options = ["rbind", "rw"]
        mount = {"destination": f"/{name}", "type": "bind", "source": str(source), "options": options}
        spec = {
            "ociVersion": "1.0.2",
            "process": {"args": ["true"], **PROCESS},
            "root": {"path": "rootfs"},
            "mounts": [mount],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "network")]},
        }
        (bundle / "config.json").write_text(json.dumps(spec), encoding="utf-8")
        root = {"type": "bind", "source": str(self.box.rootfs), "options": options}
        try:
            self.box.call("Create", id=name, bundle=str(bundle), rootfs=[root])
        except grpc.RpcError as error:
            said = error.details() or ""
        else:
            said = self.run_as_guest(f"cd $V/+*-{name} 2>/dev/null && ls && cat * || cat $V/+*-{name}")
            self.box.call("Delete", id=name)
        self.said.append(said)
        return said


def privileged(stack: Stack, place: Path, *volumes: tuple[Path, str, str]) -> ByHand:
    """Describe a privileged container with volumes: path on the host, destination, mode."""
    mounts = [
        {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", mode]}
        for source, destination, mode in volumes
    ]
    return ByHand(stack, place, mounts=mounts, linux=PRIVILEGED, capabilities=CAPABILITIES)

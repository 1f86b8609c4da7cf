"""A container with every privilege, and root of its machine with that, reaches no file that it was not given.

Everything is really tried, in one machine: from inside the container, and from the machine's own namespaces,
which a privileged container can enter. Files of random content lie on the host next to what is shared, on the
same file system; they may neither show up in any output nor change.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import textwrap
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.e2e.by_hand import PROCESS, ByHand
from tests.e2e.conftest import new_id
from tests.e2e.life import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.timeout(240)]

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
GUEST = "/guest"
RACE_S = 3
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
NOT_THERE = "No such file or directory"


@dataclass(frozen=True, slots=True)
class Sentinel:
    """A file that nobody was given: what it holds, and who may do what with it."""

    path: Path
    content: bytes
    status: tuple[int, ...]

    @classmethod
    def plant(cls, path: Path) -> Sentinel:
        """Make one."""
        path.write_text(f"{MARK}{secrets.token_hex(16)}\n")
        return cls(path, path.read_bytes(), cls._status(path))

    def assert_untouched(self) -> None:
        """Compare it with what it was."""
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
        """Run a shell script in the container and return all it printed, whatever became of it."""
        said = self.box.output("sh", "-c", f"exec 2>&1\n{script}\ntrue")
        self.said.append(said)
        return said

    def run_as_guest(self, script: str) -> str:
        """Run a shell script as root of the machine, where its first process has its files."""
        programs = f"{SHARE}/{self.box.id}/rootfs/bin"
        enter = f"PATH={programs}:/usr/bin S={SHARE} ME={SHARE}/{self.box.id}/rootfs; cd /; exec 2>&1"
        shell = [f"{programs}/sh", "-c", f"export {enter}\n{script}\ntrue"]
        said = self.box.output("nsenter", f"--mount={GUEST}/1/ns/mnt", *shell)
        self.said.append(said)
        return said

    def run_python(self, program: str) -> dict[str, set[str]]:
        """Run a program as root of the machine, after :data:`ATTEMPTS`.

        :returns: what became of each kind of system call that it tried: names of errors, or ``done``.
        """
        script = self.place / "hostile" / "rootfs" / "attempt.py"
        script.write_text(f"box = {self.box.id!r}\n{ATTEMPTS}\n{textwrap.dedent(program)}", encoding="utf-8")
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
            said = self.run_as_guest(
                f"cd $S/{name}-*-{name} 2>/dev/null && ls && cat * || cat $S/{name}-*-{name}"
            )
            self.box.call("Delete", id=name)
        self.said.append(said)
        return said


def privileged(stack: Stack, place: Path, *volumes: tuple[Path, str, str]) -> ByHand:
    """Describe a privileged container with volumes: path on the host, destination, ``ro`` or ``rw``."""
    mounts = [
        {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", mode]}
        for source, destination, mode in volumes
    ]
    return ByHand(stack, place, mounts=mounts, linux=PRIVILEGED, capabilities=CAPABILITIES)


@pytest.fixture(scope="module")
def place(one_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory on the host with the volumes, one of them with another file system below it."""
    path = tmp_path_factory.mktemp("hostile")
    for name in ("volume", "volume/inner", "read-only", "read-only/below", "neighbour", "bundles"):
        (path / name).mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "tmpfs", path / "read-only" / "below"], check=True)
    for directory in ("read-only", "read-only/below"):
        (path / directory / "file").write_text("given to read\n")
    yield path
    subprocess.run(["/usr/bin/umount", path / "read-only" / "below"], check=True)


@pytest.fixture(scope="module")
def attacker(one_stack: Stack, place: Path) -> Iterator[Attacker]:
    """A privileged container that has entered the namespaces of its machine."""
    sentinels = [Sentinel.plant(place / name) for name in ("sentinel", "neighbour/sentinel")]
    (place / "hostile").mkdir()
    volumes = [
        (place / "volume", "/vol", "rw"),
        (place / "volume" / "inner", "/inner", "rw"),
        (place / "read-only", "/ro", "ro"),
    ]
    others = set(one_stack.state_directory.iterdir())
    with privileged(one_stack, place / "hostile", *volumes) as box:
        [state] = set(one_stack.state_directory.iterdir()) - others
        sentinels.append(Sentinel.plant(state / "sentinel"))
        sentinels.append(Sentinel.plant(place / "hostile" / "sentinel"))
        attacker = Attacker(box, place, sentinels)
        # The kernel starts its handler of core dumps in its first process' namespaces, with all rights: here
        # one that gives the container that process' view of all processes.
        handler = (
            f"/proc/%P/root/bin/busybox nsenter --mount=/proc/%P/ns/mnt /bin/mount -t proc guest {GUEST}"
        )
        attacker.run(
            f"mkdir {GUEST}; echo '|{handler}' > /proc/sys/kernel/core_pattern; sh -c 'kill -SEGV $$'"
        )
        until(
            lambda: "init" in attacker.run(f"cat {GUEST}/1/comm"),
            what="the container sees the machine's init",
        )
        yield attacker


def names_in(directory: Path) -> list[str]:
    """List a directory of the host."""
    return sorted(one.name for one in directory.iterdir())


@pytest.fixture(autouse=True)
def nothing_reached(attacker: Attacker) -> Iterator[None]:
    """After each attempt nothing has leaked, nothing has changed, and the shim serves."""
    state = attacker.sentinels[2].path.parent
    places = (
        attacker.place,
        attacker.place / "neighbour",
        attacker.place / "read-only",
        state,
        state / "share",
    )
    beside = {path: names_in(path) for path in places}
    yield
    assert MARK not in "".join(attacker.said)
    for sentinel in attacker.sentinels:
        sentinel.assert_untouched()
    assert {path: names_in(path) for path in beside} == beside
    assert attacker.run("echo served") == "served\n"


def assert_all_refused(said: str, *reasons: str) -> None:
    """Make sure that every line of an attempt's output says that it failed, and why.

    :param said: the output.
    :param reasons: the errors that may be the cause.
    """
    lines = said.splitlines()
    assert lines
    assert [line for line in lines if not line.endswith(reasons)] == []


def test_the_attacker_is_root_of_the_machine(attacker: Attacker):
    said = attacker.run_as_guest(
        "id -u; cat /proc/self/mounts; echo x > $ME/mine && rm $ME/mine && echo wrote"
    )
    assert said.startswith("0\nrootfs / rootfs")
    assert f"{SHARE} virtiofs" in said
    assert said.endswith("wrote\n")


def test_no_number_of_dots_leads_out_of_the_share(attacker: Attacker):
    ups = ["/".join([".."] * number) for number in range(1, 12)]
    paths = " ".join(f"{up}/{path}" for up in ups for path in ("sentinel", attacker.prey))
    inside = f"for at in / /vol /inner /ro /ro/below /proc/self/fd; do cd $at; cat {paths}; done"
    assert_all_refused(attacker.run(inside), NOT_THERE)
    roots = "$S $ME $S/*-vol $S/*-inner $S/*-ro/below /again"
    again = "mkdir /again && mount -t virtiofs kataShared /again"
    script = f"{again}; for at in {roots}; do cd $at && cat {paths}; done; cd /; umount /again; rmdir /again"
    assert_all_refused(attacker.run_as_guest(script), NOT_THERE)


def test_the_share_itself_is_read_only(attacker: Attacker):
    attacker.run_as_guest("mount -o remount,rw $S")
    outcomes = attacker.run_python(f"""
        make_everything_in({SHARE!r})
        make_everything_in({SHARE!r} + "/" + box)
        for each in os.scandir({SHARE!r}):
            attempt(os.rename, each.path, each.path + "-away")
            attempt(os.rmdir, each.path)
        spoil({SHARE!r} + "/" + box)
    """)
    assert "mknod" in outcomes
    assert set().union(*outcomes.values()) <= {"EROFS", "EBUSY", "EPERM"}, outcomes


def test_a_read_only_volume_stays_so_with_what_is_mounted_below_it(attacker: Attacker):
    remount = "for at in %s %s/below; do mount -o remount,rw $at; mount -o remount,rw,bind $at; done"
    attacker.run(
        remount % ("/ro", "/ro") + "; touch /ro/planted /ro/below/planted; rm /ro/file /ro/below/file"
    )
    attacker.run_as_guest(remount % ("$S/*-ro", "$S/*-ro"))
    outcomes = attacker.run_python(f"""
        [volume] = [one.path for one in os.scandir({SHARE!r}) if one.name.endswith("-ro")]
        for directory in (volume, volume + "/below"):
            make_everything_in(directory)
            spoil(directory + "/file")
    """)
    assert "setxattr" in outcomes
    assert set().union(*outcomes.values()) <= {"EROFS", "EPERM"}, outcomes


def test_links_lead_nowhere_but_into_the_machine(attacker: Attacker):
    prey = attacker.prey
    targets = [prey, "../sentinel", "../../../sentinel", f"/proc/1/root{prey}", f"{GUEST}/1/root{prey}"]
    links = "".join(f"ln -s {target} $at/links/{number}\n" for number, target in enumerate(targets))
    script = f"""
        for at in %s; do
            mkdir $at/links $at/hard; {links} ln $at/links/* $at/hard/
            cat $at/links/* $at/hard/*; rm -r $at/links $at/hard
        done
    """
    assert_all_refused(attacker.run(script % "/vol /inner /" + f"ln {prey} /vol/hard"), NOT_THERE)
    assert_all_refused(attacker.run_as_guest(script % "$S/*-vol $ME"), NOT_THERE)
    said = attacker.run(
        "touch /vol/x; ln /ro/file /vol/hard; ln /vol/x /inner/x; ln /ro/file /hard; rm /vol/x"
    )
    assert_all_refused(said, "Invalid cross-device link")


def test_a_link_made_in_a_volume_is_not_followed_on_the_host(attacker: Attacker):
    volume = attacker.place / "volume"
    attacker.run(
        f"ln -s {attacker.prey} /vol/to-file; ln -s {attacker.place} /vol/to-directory; ln -s .. /vol/up"
    )
    for path in ("to-file", "to-directory", "to-directory/sentinel", "up/sentinel", "inner/../../sentinel"):
        assert "in a directory that a guest writes in" in attacker.create(volume / path)
    attacker.run("mkdir /vol/real; echo innocent > /vol/real/file; mkfifo /vol/fifo; mknod /vol/disk b 8 0")
    assert attacker.create(volume / "real") == "file\ninnocent\n"
    assert "is a FIFO of the host" in attacker.create(volume / "fifo")
    assert "is a block device of the host" in attacker.create(volume / "disk")


def test_a_path_that_changes_all_the_time_leads_nowhere_else(attacker: Attacker):
    swap = f"""
        mkdir -p /vol/swap/a /vol/swap/b; echo innocent > /vol/swap/a/sentinel
        ln -s {attacker.place} /vol/swap/link; cd /vol/swap
        end=$(( $(date +%s) + {RACE_S} ))
        while [ $(date +%s) -lt $end ]; do
            for _ in 1 2 3 4 5 6; do mv a b/; mv link a; mv a link; mv b/a a; done
        done
    """
    swapping = threading.Thread(target=attacker.run, args=(swap,))
    swapping.start()
    said = []
    while swapping.is_alive():
        said.append(attacker.create(attacker.place / "volume" / "swap" / "a" / "sentinel"))
        said.append(
            attacker.run("cat /vol/swap/a/sentinel /vol/swap/a/../sentinel /vol/swap/a/../../sentinel")
        )
    swapping.join()
    assert said


def test_directories_that_move_while_somebody_is_in_them_lead_nowhere_else(attacker: Attacker):
    move = f"""
        mkdir -p /inner/a/b/c /vol/out; cd /vol
        end=$(( $(date +%s) + {RACE_S} ))
        while [ $(date +%s) -lt $end ]; do
            mv inner/a out/a; mv out/a/b out/b; mv out/b out/a/b; mv out/a inner/a
        done
    """
    ups = ["/".join([".."] * number) for number in range(1, 8)]
    paths = " ".join(f"{up}/{path}" for up in ups for path in ("sentinel", attacker.prey))
    moving = threading.Thread(target=attacker.run, args=(move,))
    moving.start()
    while moving.is_alive():
        attacker.run(f"cd /inner/a/b/c; for _ in 1 2 3 4; do cat {paths}; ls -a .. ../.. ../../..; done")
    moving.join()


def test_device_nodes_are_of_the_machine(attacker: Attacker, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.write_text(f"{MARK}on a disk of the host\n" * 100)
    argv = ["/usr/sbin/losetup", "--find", "--show", disk]
    loop = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        numbers = {tuple(each.name.split(":")) for each in Path("/sys/dev/block").iterdir()}
        numbers.add((str(os.major(Path(loop).stat().st_rdev)), str(os.minor(Path(loop).stat().st_rdev))))
        script = "".join(
            f"for at in /vol /; do mknod $at/disk-{major}-{minor} b {major} {minor}; done\n"
            for major, minor in sorted(numbers)
        )
        attacker.run(script)
        said = attacker.run("for at in /vol /; do head -c 512 $at/disk-*; echo x | dd of=$at/disk-7-0; done")
        said += attacker.run_as_guest("cat $S/*-vol/disk-7-*; rm -f $ME/disk-* $S/*-vol/disk-*")
    finally:
        subprocess.run(["/usr/sbin/losetup", "--detach", loop], check=True)
    assert said
    assert "No such device or address" in said
    assert disk.read_text() == f"{MARK}on a disk of the host\n" * 100


def test_sockets_and_fifos_do_not_reach_processes_of_the_host(attacker: Attacker):
    volume = attacker.place / "volume"
    os.mkfifo(volume / "host.fifo")
    reader = os.open(volume / "host.fifo", os.O_RDONLY | os.O_NONBLOCK)
    with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as closing:
        closing.callback(os.close, reader)
        server.bind(str(volume / "host.sock"))
        server.listen()
        server.setblocking(False)
        said = attacker.run_as_guest("""
            cd $S/*-vol
            /usr/bin/python3.11 -ISBc 'import _socket; _socket.socket(1, 1).connect("host.sock")'
            timeout 1 sh -c 'echo hello > host.fifo' || echo nobody reads
            timeout 1 cat host.sock
        """)
        assert "ConnectionRefusedError" in said
        assert "nobody reads" in said
        with pytest.raises(BlockingIOError):
            server.accept()
        assert os.read(reader, 100) == b""


def test_attributes_and_handles_of_files_open_nothing(attacker: Attacker):
    attacker.run("mkdir /vol/attributes; touch /vol/attributes/file; cp /bin/busybox /vol/attributes/busybox")
    outcomes = attacker.run_python(f"""
        import _ctypes  # the guest's Python has no more of ctypes
        [volume] = [one.path for one in os.scandir({SHARE!r}) if one.name.endswith("-vol")]
        for path in (volume + "/attributes", volume + "/attributes/file", "{SHARE}/" + box + "/rootfs/vol"):
            for name in ("trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.x"):
                attempt(os.setxattr, path, name, b"y")
        attempt(os.chmod, volume + "/attributes/busybox", 0o6777)

        class Int(_ctypes._SimpleCData):
            _type_ = "i"

        class Function(_ctypes.CFuncPtr):
            _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
            _restype_ = Int

        program = _ctypes.dlopen(None, os.RTLD_NOW)
        system_call = Function(_ctypes.dlsym(program, "open_by_handle_at"))
        def open_by_handle_at(number, generation):
            mount = os.open(volume, os.O_RDONLY)
            kinds = {{0x81: (0, number, generation), 1: (number, generation), 2: (number, 0, 1, 0)}}
            for kind, words in kinds.items():
                words = (4 * len(words), kind, *words)
                handle = b"".join(word.to_bytes(4, "little") for word in words)
                opened = system_call(mount, handle, os.O_RDONLY)
                if opened >= 0:
                    print("opened", os.listdir(opened) if os.path.isdir(opened) else os.read(opened, 100))
                    os.close(opened)
            os.close(mount)
            raise OSError(_ctypes.get_errno(), "")
        for number in (1, 2, {attacker.sentinels[0].path.stat().st_ino}):
            attempt(open_by_handle_at, number, 0)
    """)
    assert outcomes["setxattr"] <= {"EPERM", "ENOTSUP"}, outcomes
    assert "opened" not in outcomes
    # As with any runtime: who puts a volume where others of the host look finds set-user-id programs there.
    assert outcomes["chmod"] == {"done"}


def test_names_and_depths_without_end_harm_nobody(attacker: Attacker):
    said = attacker.run_as_guest("""
        cat > $ME/attempt.py <<'END'
import errno, os, sys
os.chdir(sys.argv[1])
for name in ("x" * 255, "x" * 256, "\\n\\t\\x7f", "...", " ", "-rf", "%n$(id)", "\\udcff\\udcfe"):
    try:
        os.mkdir(name)
    except OSError as error:
        print(len(name), errno.errorcode[error.errno])
for depth in range(100):
    os.mkdir("y" * 200)
    os.chdir("y" * 200)
with open("bottom", "w") as file:
    file.write("reached")
print(open("bottom").read())
for depth in range(100):
    os.remove("bottom") if depth == 0 else os.rmdir("y" * 200)
    os.chdir("..")
END
        cd $S/*-vol
        mkdir deep
        /usr/bin/python3.11 -ISB $ME/attempt.py $PWD/deep
    """)
    assert said == "256 ENAMETOOLONG\nreached\n"


def test_the_daemon_that_serves_files_sees_no_others_itself(attacker: Attacker, one_stack: Stack):
    below = [(one, one.command.split()[0]) for one in one_stack.containerd.nursery.descendants()]
    running = [one for one, program in below if program.endswith("virtiofsd") and "--help" not in one.command]
    # It is two processes, of which the younger serves.
    pid = max(running, key=lambda process: (process.start_time, process.pid)).pid
    root = Path(f"/proc/{pid}/root")
    shown = {one.name for one in root.iterdir()}
    assert "watchable" in shown
    assert all(name == "watchable" or name.startswith(attacker.box.id) for name in shown)
    assert not root.joinpath(*attacker.place.parts[1:]).exists()


def test_a_pod_sees_nothing_of_another(attacker: Attacker, one_stack: Stack, tmp_path: Path):
    with privileged(one_stack, tmp_path, (attacker.place / "neighbour", "/vol", "rw")) as neighbour:
        assert MARK in neighbour.output("cat", "/vol/sentinel")
        said = attacker.run_as_guest(f"find $S -type f -exec grep -l {MARK} {{}} +; ls $S")
        assert said.splitlines()[0] == attacker.box.id
        assert neighbour.id not in said

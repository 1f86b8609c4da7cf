"""A container with every privilege, and root of its machine with that, reaches no file that it was not given.

Everything is really tried, in one machine: from inside the container, and from the machine's own namespaces,
which a privileged container can enter. Files of random content lie on the host next to the shared
directories, on the same file system. They must neither appear in any output nor change.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.agent.guest_names import agent_id
from shim.agent.guest_paths import MODULES_NAME
from tests.e2e.attacker import GUEST, MARK, SHARE, Attacker, Sentinel, privileged
from tests.e2e.life import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.timeout(240)]

RACE_S = 3
MOUNTED = ("read-only/below", "all-read-only/under")
HIDDEN = f"{MARK}below what is mounted on it"
NOT_THERE = "No such file or directory"


@pytest.fixture(scope="module")
def place(one_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory on the host with the volumes, one of them with another file system below it."""
    path = tmp_path_factory.mktemp("hostile")
    for name in ("volume", "volume/inner", "neighbour", "bundles"):
        (path / name).mkdir()
    for name in MOUNTED:
        (path / name).mkdir(parents=True)
        (path / name / "hidden").write_text(HIDDEN)
        subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "tmpfs", path / name], check=True)
    for directory in ("read-only", "all-read-only", *MOUNTED):
        (path / directory / "file").write_text("given to read\n")
    yield path
    for name in MOUNTED:
        subprocess.run(["/usr/bin/umount", path / name], check=True)


@pytest.fixture(scope="module")
def attacker(one_stack: Stack, place: Path) -> Iterator[Attacker]:
    """A privileged container that has entered the namespaces of its machine."""
    sentinels = [Sentinel.plant(place / name) for name in ("sentinel", "neighbour/sentinel")]
    (place / "hostile").mkdir()
    volumes = [
        (place / "volume", "/vol", "rw"),
        (place / "volume" / "inner", "/inner", "rw"),
        (place / "read-only", "/ro", "ro"),
        (place / "all-read-only", "/rro", "rro"),
    ]
    with privileged(one_stack, place / "hostile", *volumes) as box:
        state = Path(one_stack.record(box.id).state_directory)
        sentinels.append(Sentinel.plant(state / "sentinel"))
        sentinels.append(Sentinel.plant(place / "hostile" / "sentinel"))
        attacker = Attacker(box, place, sentinels)
        # The kernel starts its handler of core dumps in its first process's namespaces, with all rights: here
        # one that gives the container that process's view of all processes.
        handler = (
            f"/proc/%P/root/bin/busybox nsenter --mount=/proc/%P/ns/mnt /bin/mount -t proc guest {GUEST}"
        )
        attacker.run(
            f"mkdir {GUEST}; echo '|{handler}' > /proc/sys/kernel/core_pattern; sh -c 'kill -SEGV $$'"
        )
        until(
            lambda: "init" in attacker.run(f"ls {GUEST}/1/root").split(),
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
        attacker.place / "all-read-only",
        state,
        state / "share",
    )
    beside = {path: names_in(path) for path in places}
    yield
    assert MARK not in "".join(attacker.said)
    for sentinel in attacker.sentinels:
        sentinel.assert_untouched()
    # The shim writes a file beside the one that it replaces.
    with contextlib.suppress(TimeoutError):
        until(lambda: {path: names_in(path) for path in beside} == beside, what="all is as it was")
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


def test_the_attacker_is_root_of_the_machine(attacker: Attacker) -> None:
    said = attacker.run_as_guest(
        "id -u; cat /proc/self/mounts; echo x > $ME/mine && rm $ME/mine && echo wrote"
    )
    assert said.startswith("0\nrootfs / rootfs")
    assert f"{SHARE} virtiofs" in said
    assert said.endswith("wrote\n")


def test_no_number_of_dots_leads_out_of_the_share(attacker: Attacker) -> None:
    ups = ["/".join([".."] * number) for number in range(1, 12)]
    paths = " ".join(f"{up}/{path}" for up in ups for path in ("sentinel", attacker.prey))
    inside = f"for at in / /vol /inner /ro /ro/below /proc/self/fd; do cd $at; cat {paths}; done"
    assert_all_refused(attacker.run(inside), NOT_THERE)
    roots = "$S $ME $S/*-vol $V/*-inner $S/*-ro $S/*-below /again"
    again = "mkdir /again && mount -t virtiofs kataShared /again"
    script = f"{again}; for at in {roots}; do cd $at && cat {paths}; done; cd /; umount /again; rmdir /again"
    assert_all_refused(attacker.run_as_guest(script), NOT_THERE)


def test_the_share_itself_is_read_only(attacker: Attacker) -> None:
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


@pytest.mark.parametrize("entries", [{"ro": "/ro"}, {"rro": "/rro", "under": "/rro/under"}])
def test_a_read_only_volume_stays_read_only_and_so_do_the_mounts_below_if_recursive(
    attacker: Attacker, entries: dict[str, str]
) -> None:
    for name, volume in entries.items():
        remount = "mount -o remount,rw $at; mount -o remount,rw,bind $at"
        attacker.run(f"at={volume}; {remount}; touch $at/planted; rm $at/file")
        attacker.run_as_guest(f"for at in $S/*-{name} $V/*-{name}; do {remount}; done")
    outcomes = attacker.run_python(f"""
        for name in {tuple(entries)!r}:
            [volume] = [one.path for one in os.scandir({SHARE!r}) if one.name.endswith("-" + name)]
            make_everything_in(volume)
            spoil(volume + "/file")
    """)
    assert "setxattr" in outcomes
    assert set().union(*outcomes.values()) <= {"EROFS", "EPERM"}, outcomes


def test_files_that_a_mount_hides_stay_hidden(attacker: Attacker) -> None:
    said = attacker.run_as_guest(
        "for at in $S $V; do cat $at/*/hidden $at/*/below/hidden $at/*/under/hidden; done"
    )
    said += attacker.run("umount /ro/below /rro/under; cat /ro/below/hidden /rro/under/hidden")
    assert_all_refused(said, NOT_THERE)


def test_the_modules_that_all_machines_share_are_read_only(attacker: Attacker) -> None:
    attacker.run_as_guest(f"for how in rw rw,bind; do mount -o remount,$how $S/{MODULES_NAME}; done")
    outcomes = attacker.run_python(f"""
        make_everything_in("{SHARE}/{MODULES_NAME}")
        spoil(next(one.path for one in os.scandir("{SHARE}/{MODULES_NAME}")))
        spoil(next(f"{{at}}/{{names[0]}}" for at, _, names in os.walk("{SHARE}/{MODULES_NAME}") if names))
    """)
    assert "mknod" in outcomes
    assert set().union(*outcomes.values()) <= {"EROFS", "EPERM"}, outcomes


def test_links_lead_nowhere_but_into_the_machine(attacker: Attacker) -> None:
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
    assert_all_refused(attacker.run_as_guest(script % "$S/*-vol $V/*-inner $ME"), NOT_THERE)
    said = attacker.run(
        "touch /vol/x; ln /ro/file /vol/hard; ln /vol/x /inner/x; ln /ro/file /hard; rm /vol/x"
    )
    assert_all_refused(said, "Invalid cross-device link")


def test_a_link_made_in_a_volume_is_not_followed_on_the_host(attacker: Attacker) -> None:
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


def test_a_path_that_changes_all_the_time_leads_nowhere_else(attacker: Attacker) -> None:
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


def test_a_directory_that_moves_while_it_is_read_leads_nowhere_else(attacker: Attacker) -> None:
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


def test_device_nodes_are_of_the_machine(attacker: Attacker, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_text(f"{MARK}on a disk of the host\n" * 100)
    argv: list[str | Path] = ["/usr/sbin/losetup", "--find", "--show", disk]
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


def test_sockets_and_fifos_do_not_reach_processes_of_the_host(attacker: Attacker) -> None:
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


def test_attributes_and_handles_of_files_open_nothing(attacker: Attacker) -> None:
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
    # An attribute that a guest may trust is an ordinary one on the host, where nothing trusts it.
    named = [
        name
        for path in (attacker.place / "volume").rglob("*")
        for name in os.listxattr(path, follow_symlinks=False)
    ]
    assert outcomes["setxattr"] <= {"done", "EPERM", "ENOTSUP"}, outcomes
    assert [name for name in named if name.startswith("trusted.")] == []
    assert "opened" not in outcomes
    # As with any runtime: who puts a volume where others of the host look finds set-user-id programs there.
    assert outcomes["chmod"] == {"done"}


def test_endless_names_and_depths_do_no_harm(attacker: Attacker) -> None:
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


def test_the_virtio_fs_daemon_sees_only_the_files_that_it_serves(
    attacker: Attacker, one_stack: Stack
) -> None:
    below = [(one, one.command.split()[0]) for one in one_stack.containerd.nursery.descendants()]
    running = [one for one, program in below if program.endswith("virtiofsd") and "--help" not in one.command]
    # It is two processes, of which the younger serves.
    pid = max(running, key=lambda process: (process.start_time, process.pid)).pid
    root = Path(f"/proc/{pid}/root")
    shown = {one.name for one in root.iterdir()}
    ours = {"watchable", MODULES_NAME}
    assert shown >= ours
    assert all(name == agent_id(attacker.box.id) or name.startswith("+") for name in shown - ours)
    assert not root.joinpath(*attacker.place.parts[1:]).exists()


def test_a_pod_sees_nothing_of_another(attacker: Attacker, one_stack: Stack, tmp_path: Path) -> None:
    with privileged(one_stack, tmp_path, (attacker.place / "neighbour", "/vol", "rw")) as neighbour:
        assert MARK in neighbour.output("cat", "/vol/sentinel")
        said = attacker.run_as_guest(
            f"find $S -name {MODULES_NAME} -prune -o -type f -exec grep -l {MARK} {{}} +; echo none; ls $S"
        )
        assert said.startswith("none\n")
        assert agent_id(attacker.box.id) in said.splitlines()
        assert neighbour.id not in said

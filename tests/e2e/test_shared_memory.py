"""The mount at ``/dev/shm``: a container's shared memory, or a volume like any other."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.bundled import bind, run, unpacked
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

SHOW = "grep ' /dev/shm ' /proc/mounts; df -k /dev/shm | tail -n 1; ls -A /dev/shm"


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    """A root file system, and a place for mounts."""
    with unpacked(home) as directory:
        yield directory


def mounted(opened: ExitStack, target: Path, options: str) -> Path:
    """Mount a tmpfs until a context ends."""
    target.mkdir(parents=True)
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", options, "shm", target], check=True)
    opened.callback(partial(subprocess.run, ["/usr/bin/umount", target], check=True))
    return target


def test_the_shared_memory_that_docker_mounts_is_the_containers(either_stack: Stack, place: Path) -> None:
    name = new_id()
    with ExitStack() as opened:
        source = mounted(
            opened, place / "containers" / name / "mounts" / "shm", "nosuid,nodev,noexec,mode=1777,size=3m"
        )
        mounts = [bind(source, "/dev/shm", "rbind", "rprivate")]
        output = run(either_stack, place, SHOW, "stat -c %a /dev/shm", mounts=mounts, name=name)
    listed, size, mode = output.splitlines()
    assert {"rw", "nosuid", "nodev", "noexec"} <= set(listed.split()[3].split(","))
    assert listed.split()[2] == "tmpfs"
    assert size.split()[1] == "3072"
    assert mode == "1777"


def test_a_volume_at_dev_shm_is_that_volume(either_stack: Stack, place: Path) -> None:
    name = new_id()
    with ExitStack() as opened:
        source = mounted(opened, place / name / "shm", "mode=1770,gid=7,size=5m")
        (source / "note").write_text("of the host\n")
        mounts = [bind(source, "/dev/shm", "rbind", "nosuid")]
        script = (SHOW, "cat /dev/shm/note", "stat -c '%a %g' /dev/shm", "echo back >/dev/shm/reply")
        output = run(either_stack, place, *script, mounts=mounts, name=name)
        assert (source / "reply").read_text() == "back\n"
    listed, size, entries, note, owner = output.splitlines()
    options = set(listed.split()[3].split(","))
    assert "nosuid" in options
    assert options.isdisjoint({"nodev", "noexec"})
    assert size.split()[1] == "5120"
    assert (entries, note, owner) == ("note", "of the host", "1770 7")


def test_the_hosts_shared_memory_is_a_directory_like_any_other(either_stack: Stack, place: Path) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="hako-") as file:
        file.write(b"of the host\n")
        file.flush()
        mounts = [
            bind(Path("/dev/shm"), "/dev/shm", "rbind"),
            bind(Path("/dev/shm"), "/host", "rbind", "ro"),
        ]
        name = Path(file.name).name
        script = (f"cat /dev/shm/{name} /host/{name}", f"(echo x >/host/{name}) 2>&1 || true")
        output = run(either_stack, place, *script, mounts=mounts)
    assert output.startswith("of the host\nof the host\n")
    assert "Read-only file system" in output

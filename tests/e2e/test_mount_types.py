"""Mounts that a specification requests by type: host or guest makes them, or they are refused by name."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.bundled import begin, run, unpacked
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    """A directory of the host with a root file system."""
    with unpacked(home) as directory:
        yield directory


def directory(path: Path, **files: str) -> Path:
    """Make a directory with some files."""
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def disk(place: Path) -> Iterator[Path]:
    """A block device with an ext4 file system."""
    content = directory(place / "content", note="on a disk\n")
    subprocess.run(
        ["/usr/sbin/mkfs.ext4", "-q", "-d", content, place / "disk.ext4", "16M"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    argv: list[str | Path] = ["/usr/sbin/losetup", "--find", "--show", place / "disk.ext4"]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(device)
    subprocess.run(["/usr/sbin/losetup", "--detach", device], check=True)


def read_from(disk: Path, path: str) -> bytes:
    """Read a file of an ext4 file system directly from its disk."""
    argv: list[str | Path] = ["/usr/sbin/debugfs", "-R", f"cat {path}", disk]
    return subprocess.run(argv, check=True, capture_output=True).stdout


def test_file_systems_on_directories_and_disks_of_the_host_are_the_hosts(
    either_stack: Stack, place: Path, disk: Path
) -> None:
    own = place / new_id()
    top, bottom = (
        directory(own / "top", top="top\n", both="top\n"),
        directory(own / "bottom", both="bottom\n"),
    )
    upper, work = directory(own / "an:odd,name"), directory(own / "work")
    (own / "link").symlink_to(bottom)
    escaped = str(upper).replace(":", "\\:").replace(",", "\\,")
    overlay = [f"lowerdir={top}:{own / 'link'}", f"upperdir={escaped}", f"workdir={work}", "nosuid"]
    mounts: list[dict[str, Any]] = [
        {"destination": "/merged", "type": "overlay", "source": "overlay", "options": overlay},
        {
            "destination": "/read",
            "type": "overlay",
            "source": "overlay",
            "options": [f"lowerdir={bottom}:{top}", "ro"],
        },
        {"destination": "/disk", "type": "ext4", "source": str(disk), "options": ["noexec", "rprivate"]},
        {"destination": "/disk/in", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]},
    ]
    output = run(
        either_stack,
        place,
        "cat /merged/top /merged/both /read/both /disk/note",
        "echo made >/merged/made; rm /merged/top; mkdir /merged/directory",
        "(echo no >/read/no) 2>&1",
        "echo kept >/disk/kept",
        "echo x >/disk/in/x && cat /disk/in/x",
        "grep -e ' /merged ' -e ' /disk ' /proc/mounts | cut -d ' ' -f 2,4",
        mounts=mounts,
    )
    lines = output.splitlines()
    assert lines[:4] == ["top", "top", "bottom", "on a disk"]
    assert "Read-only file system" in lines[4]
    assert lines[5] == "x"
    options = {target: set(found.split(",")) for target, found in (line.split() for line in lines[6:])}
    assert "nosuid" in options["/merged"]
    assert "noexec" in options["/disk"]
    assert (upper / "made").read_text() == "made\n"
    assert (upper / "top").is_char_device(), "what hides a file of a lower layer"
    assert (upper / "directory").is_dir()
    assert (top / "top").exists()
    assert read_from(disk, "/kept") == b"kept\n"


@pytest.mark.hako
def test_a_disk_has_all_that_a_container_wrote_when_it_is_gone_though_the_machine_lives_on(
    one_stack: Stack, place: Path, disk: Path
) -> None:
    first = new_id()
    grouped = {"io.containerd.runc.v2.group": first}
    mounts: list[dict[str, Any]] = [{"destination": "/disk", "type": "ext4", "source": str(disk)}]
    begin(one_stack, place, "sleep 100000", name=first, annotations=grouped)
    try:
        run(one_stack, place, "echo written >/disk/used", mounts=mounts, annotations=grouped)
        assert read_from(disk, "/used") == b"written\n"
        again = run(one_stack, place, "cat /disk/used", mounts=mounts, annotations=grouped)
        assert again == "written\n"
    finally:
        one_stack.containerd.remove(first)


def test_file_systems_of_the_kernel_are_the_containers_own(either_stack: Stack, place: Path) -> None:
    mounts: list[dict[str, Any]] = [
        {"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m"]},
        {"destination": "/ram", "type": "ramfs", "source": "ramfs"},
        {"destination": "/queues", "type": "mqueue", "source": "mqueue", "options": ["nosuid"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        {"destination": "/terminals", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
    ]
    output = run(
        either_stack,
        place,
        "head -n 1 /etc/passwd",
        "ls -d /sys/kernel",
        "grep -e ' /etc ' -e ' /ram ' -e ' /queues ' -e ' /terminals ' /proc/mounts | cut -d ' ' -f 2,3",
        mounts=mounts,
    )
    assert output.splitlines() == [
        "root:x:0:0:root:/root:/bin/sh",
        "/sys/kernel",
        "/etc tmpfs",
        "/ram ramfs",
        "/queues mqueue",
        "/terminals devpts",
    ]


@pytest.mark.parametrize(
    ("mount", "named"),
    [
        ({"type": "ext4", "source": "/etc/passwd"}, "Block device required"),
        ({"type": "nfs", "source": "192.0.2.1:/srv"}, "nfs: it is served over a network"),
    ],
    ids=["refused by the kernel", "not served"],
)
def test_a_file_system_that_cannot_be_is_named_in_one_line(
    one_stack: Stack, place: Path, mount: dict[str, Any], named: str
) -> None:
    error = run(one_stack, place, "true", mounts=[{"destination": "/x", **mount}], fails=True)
    assert "mounts: '/x': " in error
    assert named in error
    assert error.strip().count("\n") == 0

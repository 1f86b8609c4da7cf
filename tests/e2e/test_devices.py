"""The file systems that a privileged container may mount, and the device files that it finds for that."""

from __future__ import annotations

import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.e2e.interpreter import interpreter
from tests.e2e.life import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack
    from tests.e2e.interpreter import Interpreter

NODES = ["fuse", "loop-control", "net/tun"]
SIZE = "16M"


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def box(either_stack: Stack, volume: Path) -> Iterator[Interpreter]:
    """A privileged container."""
    with interpreter(either_stack, binds={volume: "/volume"}, options=["--privileged"]) as opened:
        yield opened


def test_a_privileged_container_mounts_a_file_through_a_loop_device(box: Interpreter, volume: Path) -> None:
    disk = volume / "disk"
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", disk, SIZE], check=True, stderr=subprocess.DEVNULL)
    box.execute("sh", "-c", "mkdir -p /mnt && /usr/bin/mount -o loop /volume/disk /mnt")
    box.execute("sh", "-c", "echo kept > /mnt/file && /usr/bin/umount /mnt")
    listing = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "cat /file", disk], check=True, capture_output=True, text=True
    )
    assert listing.stdout == "kept\n"
    # The device is let go by the last that has the file system's disk open, which may be the kernel.
    listed = partial(box.execute, "/usr/sbin/losetup", "--list", "--noheadings")
    until(lambda: "/volume/disk" not in listed(), what="the loop device is free")


@pytest.mark.parametrize("node", NODES)
def test_a_privileged_container_opens_the_device_of_a_kernel_module(box: Interpreter, node: str) -> None:
    box.execute("sh", "-c", f"exec 3<> /dev/{node}")


def test_a_privileged_container_mounts_an_overlay_whose_upper_directory_is_on_a_volume(
    box: Interpreter,
) -> None:
    box.execute(
        "sh",
        "-ec",
        """
        mkdir -p /volume/lower/gone /volume/upper /volume/work /overlay
        echo old > /volume/lower/file; echo old > /volume/lower/gone/file
        /usr/bin/mount -t overlay overlay \\
            -o lowerdir=/volume/lower,upperdir=/volume/upper,workdir=/volume/work /overlay
        echo new > /overlay/file; rm -r /overlay/gone; mkdir /overlay/gone; mv /overlay/gone /overlay/moved
        echo kept > /overlay/moved/file
        umount /overlay
        /usr/bin/mount -t overlay overlay -o lowerdir=/volume/upper:/volume/lower /overlay
    """,
    )
    assert box.ask("sh", "-c", "cd /overlay && find . -type f | sort | xargs grep .").split() == [
        "./file:new",
        "./moved/file:kept",
    ]
    assert box.ask("cat", "/volume/lower/file", "/volume/lower/gone/file") == "old\nold\n"
    box.execute("umount", "/overlay")
    box.execute(
        "rm", "-r", "/volume/lower", "/volume/upper", "/volume/work"
    )  # the next box has this volume, too


def test_a_privileged_container_keeps_trusted_attributes(box: Interpreter) -> None:
    box.execute("touch", "/volume/trusted")
    program = (
        "import os; os.setxattr('/volume/trusted', 'trusted.x', b'1'); print(os.listxattr('/volume/trusted'))"
    )
    assert box.ask("/usr/bin/python3", "-c", program) == "['trusted.x']\n"

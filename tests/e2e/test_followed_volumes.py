"""Mounts and unmounts of the host below a volume while a container has it."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.e2e.bundled import bind, specification, unpacked
from tests.e2e.conftest import new_id
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

WITHIN_S = patient(60.0)
OPTIONS = {
    "rslave": ("rbind", "rslave"),
    "default": ("rbind",),
    "read": ("rbind", "rslave", "ro"),
    "bind": ("bind", "rslave"),
    "rprivate": ("rbind", "rprivate"),
}
FOLLOWING = {"rslave", "default", "read", "bind"}


class Box:
    """A container that has the volume in every way."""

    def __init__(self, stack: Stack, name: str, volume: Path) -> None:
        self.stack = stack
        self.name = name
        self.volume = volume
        self.execs = 0

    def run(self, script: str) -> str:
        self.execs += 1
        done = self.stack.containerd.exec(self.name, f"exec-{self.execs}", "sh", "-c", script)
        assert done.code == 0, done.stderr
        return done.stdout

    def ask(self, script: str) -> str:
        """Run a script that only looks, and says something."""
        self.execs += 1
        done = self.stack.containerd.ask(self.name, f"exec-{self.execs}", "sh", "-c", script)
        assert done.code == 0, done.stderr
        return done.stdout

    def seeing(self, path: str) -> set[str]:
        """Name the ways in which the container sees a file below the volume."""
        said = self.ask(f"ls -d /*/{path} 2>/dev/null; echo done").splitlines()
        assert said[-1] == "done"
        return {line.split("/")[1] for line in said[:-1]}

    def wait_until_seeing(self, path: str, ways: set[str]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while (seen := self.seeing(path)) != ways:
            assert time.monotonic() < deadline, seen


def mount(target: Path, options: str = "rw") -> None:
    target.mkdir(exist_ok=True)
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", target], check=True)
    (target / "file").touch()


def unmount(target: Path) -> None:
    subprocess.run(["/usr/bin/umount", target], check=True)


@contextmanager
def boxed(stack: Stack, place: Path, volume: Path) -> Iterator[Box]:
    name = new_id()
    mounts = [bind(volume, f"/{way}", *options) for way, options in OPTIONS.items()]
    config = place / f"{name}.json"
    config.write_text(json.dumps(specification(place, ("exec sleep 100000",), mounts, {})))
    containerd = stack.containerd
    try:
        done = containerd.ctr("run", "--detach", "--runtime", containerd.runtime, "--config", config, name)
        assert done.code == 0, done.stderr
        yield Box(stack, name, volume)
    finally:
        containerd.remove(name)


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    with unpacked(home) as directory:
        yield directory


@pytest.fixture
def volume(place: Path) -> Iterator[Path]:
    """A volume with something mounted below it."""
    path = place / "volume"
    mount(path)
    mount(path / "before")
    yield path
    subprocess.run(["/usr/bin/umount", "--recursive", path], check=True)


def test_mounts_of_the_host_come_and_go_where_a_volume_is_followed(
    either_stack: Stack, place: Path, volume: Path
) -> None:
    with boxed(either_stack, place, volume) as box:
        later = volume / "later"
        mount(later, "noexec,nosuid,size=1m")
        box.wait_until_seeing("later/file", FOLLOWING)
        listed = box.ask("grep ' /rslave/later ' /proc/mounts")
        assert {"noexec", "nosuid"} <= set(listed.split()[3].split(","))
        box.run("echo x > /rslave/later/file; cat /default/later/file /read/later/file")
        assert (later / "file").read_text() == "x\n"
        mount(later / "deeper")
        box.wait_until_seeing("later/deeper/file", FOLLOWING)
        unmount(later / "deeper")
        box.wait_until_seeing("later/deeper/file", set())
        unmount(later)
        box.wait_until_seeing("later/file", set())

        assert box.seeing("before/file") == set(OPTIONS) - {"bind"}
        unmount(volume / "before")
        box.wait_until_seeing("before/file", {"rprivate"})


def test_a_disk_that_the_host_unmounts_is_free_at_once(
    either_stack: Stack, place: Path, volume: Path
) -> None:
    image = place / "disk.ext4"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", image], check=True)
    later = volume / "later"
    later.mkdir()
    with boxed(either_stack, place, volume) as box:
        for _ in range(2):  # the same place again
            subprocess.run(["/usr/bin/mount", "-o", "loop", image, later], check=True)
            box.wait_until_seeing("later/lost+found", FOLLOWING)
            box.run("ls -lR /rslave/later; echo x > /default/later/file")
            unmount(later)
            deadline = time.monotonic() + WITHIN_S
            while loop_devices_of(image):
                assert time.monotonic() < deadline
            box.wait_until_seeing("later/lost+found", set())
    subprocess.run(["/usr/sbin/fsck.ext4", "-fn", image], check=True, capture_output=True)


def loop_devices_of(image: Path) -> str:
    argv: list[str | Path] = ["/usr/sbin/losetup", "--associated", image]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

"""Measures how fast a container reads and writes: a disk, a volume, and its root file system."""

from __future__ import annotations

import contextlib
import enum
import functools
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks import bare
from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.worker import in_container
from tests.e2e.busybox import rootfs_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scripts.benchmarks.stage import Stage
    from scripts.benchmarks.worker import Worker

MIB = 1 << 20
SIZE_MIB = 128
PIECES = 4000
FILES = 2000
"""Five rounds make 10,000."""


class Place(enum.Enum):
    """What is read and written."""

    DISK = enum.auto()
    VOLUME = enum.auto()
    ROOT = enum.auto()


def disk_read(stage: Stage) -> Samples:
    """Read 128 MiB of a block device in a container, in order, as MiB/s; higher is better.

    The host has it in memory, the guest does not.
    Baseline: the same program in a bare QEMU of the same size, on a virtio-blk disk that uses io_uring.
    """
    return _in_order(stage, Place.DISK, "read")


def disk_write(stage: Stage) -> Samples:
    """Write 128 MiB to a block device, in order, until they are stored; otherwise as disk_read."""
    return _in_order(stage, Place.DISK, "write")


def disk_random_read(stage: Stage) -> Samples:
    """Read 4000 blocks of 4 KiB one by one all over a block device, as blocks/s; higher is better.

    Otherwise as disk_read.
    """
    return _all_over(stage, Place.DISK, "random_read")


def disk_random_write(stage: Stage) -> Samples:
    """Write 4000 blocks of 4 KiB all over a block device until they are stored, as blocks/s.

    Otherwise as disk_read.
    """
    return _all_over(stage, Place.DISK, "random_write")


def file_read(stage: Stage) -> Samples:
    """Read a file of 128 MiB on a volume in a container, in order, as MiB/s; higher is better.

    The host has it in memory, the guest does not.
    Baseline: the same program in a bare QEMU of the same size, on a virtio-fs share whose daemon has the
    settings that are fastest, though a guest sees what the host changes late or never with them.
    """
    return _in_order(stage, Place.VOLUME, "read")


def file_write(stage: Stage) -> Samples:
    """Write a file of 128 MiB on a volume, in order, until it is stored; otherwise as file_read."""
    return _in_order(stage, Place.VOLUME, "write")


def file_random_read(stage: Stage) -> Samples:
    """Read 4000 blocks of 4 KiB one by one all over a file on a volume, as blocks/s; higher is better.

    Otherwise as file_read.
    """
    return _all_over(stage, Place.VOLUME, "random_read")


def file_random_write(stage: Stage) -> Samples:
    """Write 4000 blocks of 4 KiB all over a file until they are stored; otherwise as file_random_read."""
    return _all_over(stage, Place.VOLUME, "random_write")


def file_tree(stage: Stage) -> Samples:
    """Make 2000 files of 1 KiB on a volume as an archive is unpacked, and remove them, as files/s.

    Otherwise as file_read.
    """
    return _tree(stage, Place.VOLUME)


def file_root_read(stage: Stage) -> Samples:
    """Read a file of 128 MiB in the container's root file system; otherwise as file_read.

    The baseline's share is an overlay, too.
    """
    return _in_order(stage, Place.ROOT, "read")


def file_root_write(stage: Stage) -> Samples:
    """Write a file of 128 MiB in the container's root file system; otherwise as file_root_read."""
    return _in_order(stage, Place.ROOT, "write")


def file_root_tree(stage: Stage) -> Samples:
    """Make and remove 2000 files in the container's root file system; otherwise as file_tree.

    The baseline's share is an overlay, too.
    """
    return _tree(stage, Place.ROOT)


def _in_order(stage: Stage, place: Place, work: str) -> Samples:
    return _compare(stage, place, lambda worker, path: SIZE_MIB / worker.ask(work, path, SIZE_MIB * MIB))


def _all_over(stage: Stage, place: Place, work: str) -> Samples:
    def measure(worker: Worker, path: str) -> float:
        return PIECES / worker.ask(work, path, SIZE_MIB * MIB, PIECES)

    return _compare(stage, place, measure)


def _tree(stage: Stage, place: Place) -> Samples:
    def measure(worker: Worker, path: str) -> float:
        return FILES / worker.ask("tree", path.rpartition("/")[0], FILES)

    return _compare(stage, place, measure)


def _compare(stage: Stage, place: Place, measure: Callable[[Worker, str], float]) -> Samples:
    with _PLACES[place](stage) as ((ours, our_path), (theirs, their_path)):
        for worker, path in ((ours, our_path), (theirs, their_path)):
            worker.ask("write", path, SIZE_MIB * MIB)
        return alternate(
            stage.rounds, value=lambda: measure(ours, our_path), baseline=lambda: measure(theirs, their_path)
        )


_Sides = tuple[tuple["Worker", str], tuple["Worker", str]]


@contextlib.contextmanager
def _disks(stage: Stage) -> Iterator[_Sides]:
    of = bare.spec(stage, template=False)
    with _memory(stage) as directory, contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(_device(directory / name)) for name in ("ours", "theirs"))
        pod = stack.enter_context(in_container(stage, "--device", str(ours)))
        machine = stack.enter_context(bare.running(stage, of, disk=theirs))
        yield (pod, str(ours)), (machine, bare.DISK)
    stage.wait_until_gone()


@contextlib.contextmanager
def _volumes(stage: Stage) -> Iterator[_Sides]:
    of = bare.spec(stage, template=False)
    with _memory(stage) as directory, contextlib.ExitStack() as stack:
        for name in ("ours", "theirs"):
            (directory / name).mkdir()
        mount = f"type=bind,src={directory}/ours,dst=/data,options=rbind:rw"
        pod = stack.enter_context(in_container(stage, "--mount", mount))
        machine = stack.enter_context(bare.running(stage, of, share=directory / "theirs"))
        yield (pod, "/data/file"), (machine, f"{bare.SHARE}/file")
        stack.close()
        stage.wait_until_gone()


@contextlib.contextmanager
def _roots(stage: Stage) -> Iterator[_Sides]:
    of = bare.spec(stage, template=False)
    place = stage.home / stage.new_id()
    lower, upper, work, root = (place / name for name in ("lower", "upper", "work", "root"))
    for directory in (lower, upper, work, root):
        directory.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(rootfs_archive())) as archive:
        archive.extractall(lower, filter="fully_trusted")  # noqa: S202 - made by this very program
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    with _mounted(root, "-t", "overlay", "-o", layers, "overlay"), contextlib.ExitStack() as stack:
        pod = stack.enter_context(in_container(stage))
        machine = stack.enter_context(bare.running(stage, of, share=root))
        yield (pod, "/root/file"), (machine, f"{bare.SHARE}/root/file")
        stack.close()
        stage.wait_until_gone()


_PLACES = {Place.DISK: _disks, Place.VOLUME: _volumes, Place.ROOT: _roots}


@contextlib.contextmanager
def _memory(stage: Stage) -> Iterator[Path]:
    """Make a file system in memory, so that the host's disk is not measured."""
    directory = stage.home / stage.new_id()
    directory.mkdir()
    with _mounted(directory, "-t", "tmpfs", "bench"):
        yield directory


@contextlib.contextmanager
def _mounted(target: Path, *arguments: str) -> Iterator[None]:
    subprocess.run(["/usr/bin/mount", *arguments, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["/usr/bin/umount", target], check=True)


@contextlib.contextmanager
def _device(file: Path) -> Iterator[Path]:
    file.write_bytes(b"")
    os.truncate(file, SIZE_MIB * MIB)
    setup = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    device = Path(setup(["/usr/sbin/losetup", "--find", "--show", file]).stdout.strip())
    try:
        yield device
    finally:
        setup(["/usr/sbin/losetup", "--detach", device])

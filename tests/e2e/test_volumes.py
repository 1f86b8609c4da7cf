"""The host's files in a container, and how they follow changes on the host."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from tests.e2e.by_hand import ByHand
from tests.e2e.life import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

MIB = 1 << 20
CONTENT = os.urandom(2 * MIB)


def publish(volume: Path, version: str, text: str) -> None:
    """Write a new version of a volume as the kubelet does."""
    (volume / version).mkdir(parents=True)
    (volume / version / "key").write_text(text)
    (volume / "..data_tmp").symlink_to(version)
    (volume / "..data_tmp").rename(volume / "..data")
    if not (volume / "key").is_symlink():
        (volume / "key").symlink_to("..data/key")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volumes")


@pytest.fixture(scope="module")
def volume(place: Path) -> Path:
    path = place / "kubernetes.io~configmap" / "config"
    publish(path, "..1", "first")
    return path


@pytest.fixture(scope="module")
def disk(place: Path) -> Path:
    path = place / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def loop(disk: Path) -> Iterator[Path]:
    argv: list[str | Path] = ["/usr/sbin/losetup", "--find", "--show", disk]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    yield type(disk)(device)
    subprocess.run(["/usr/sbin/losetup", "--detach", device], check=True)


@pytest.fixture(scope="module")
def outer(place: Path) -> Iterator[Path]:
    """A directory with something mounted below it."""
    inner = place / "outer" / "inner"
    inner.mkdir(parents=True)
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "tmpfs", inner], check=True)
    yield inner.parent
    subprocess.run(["/usr/bin/umount", inner], check=True)


@pytest.fixture(scope="module")
def box(one_stack: Stack, place: Path, volume: Path, outer: Path, loop: Path) -> Iterator[ByHand]:
    """A container with a root file system on a disk, a disk as a device, a ConfigMap and directories."""
    number = loop.stat().st_rdev
    shared, private = place / "shared", place / "private"
    shared.mkdir()
    private.mkdir()
    binds = [
        (volume, "/config", ["rbind", "ro"]),
        (shared, "/shared", ["rbind", "rslave"]),
        (private, "/private", ["rbind", "rprivate", "ro"]),
        (outer, "/ro", ["rbind", "rprivate", "ro"]),
        (outer, "/rro", ["rbind", "rprivate", "rro"]),
    ]
    mounts = [
        {"destination": target, "type": "bind", "source": str(source), "options": options}
        for source, target, options in binds
    ]
    linux = {
        "devices": [{"path": "/dev/data", "type": "b", "major": os.major(number), "minor": os.minor(number)}]
    }
    with ByHand(one_stack, place, mounts=mounts, linux=linux, disk=place / "root.ext4") as opened:
        yield opened
    listing = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "cat /written", place / "root.ext4"], check=True, capture_output=True
    )
    # Seen once the container and its machine are gone: nothing was left in the guest's memory.
    assert listing.stdout == b"kept\n"


def test_a_root_file_system_on_a_disk_is_mounted_by_the_guest(box: ByHand) -> None:
    assert "ext4" in next(line for line in box.output("cat", "/proc/mounts").splitlines() if " / " in line)
    box.output("sh", "-c", "echo kept > /written")


def test_a_block_device_is_a_disk_with_the_same_bytes(box: ByHand, disk: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert box.output("sha256sum", "/dev/data").split()[0] == digest
    box.output("sh", "-c", "yes | head -c 512 | dd of=/dev/data conv=fsync,notrunc 2>/dev/null")
    assert disk.read_bytes()[:512] == b"y\n" * 256


def test_a_disk_that_grows_on_the_host_grows_in_the_container_with_the_next_update(
    box: ByHand, disk: Path, loop: Path
) -> None:
    os.truncate(disk, 3 * MIB)
    subprocess.run(["/usr/sbin/losetup", "--set-capacity", loop], check=True)
    number = loop.stat().st_rdev
    rate = {"major": os.major(number), "minor": os.minor(number), "rate": MIB}
    with pytest.raises(grpc.RpcError, match="resources: malformed") as refused:
        box.call("Update", resources=AnyMessage(type_url="LinuxResources", value=b'{"blockIO": [7]}'))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    value = f'{{"blockIO": {{"throttleReadBpsDevice": [{rate}]}}}}'.replace("'", '"')
    box.call("Update", resources=AnyMessage(type_url="LinuxResources", value=value.encode()))
    assert int(box.output("blockdev", "--getsize64", "/dev/data")) == 3 * MIB


def test_a_change_of_a_config_map_reaches_the_containers_own_copy(box: ByHand, volume: Path) -> None:
    assert box.output("cat", "/config/key") == "first"
    # The copy is what makes the change an event: a share carries none.
    assert "tmpfs" in next(
        line for line in box.output("cat", "/proc/mounts").splitlines() if "/config" in line
    )
    publish(volume, "..2", "second")
    until(lambda: box.output("cat", "/config/key") == "second", what="the change is seen")


@pytest.mark.parametrize(("bind", "seen"), [("shared", "from the host"), ("private", "")])
def test_a_file_system_that_the_host_mounts_later_is_seen_where_that_was_asked_for(
    box: ByHand, place: Path, bind: str, seen: str
) -> None:
    target = place / bind / "later"
    target.mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "tmpfs", target], check=True)
    try:
        (target / "file").write_text("from the host")
        look = partial(box.output, "sh", "-c", f"cat /{bind}/later/* 2>/dev/null || true")
        if seen:  # the shim hears of the mount, and shows it to the guest
            until(look, what="the mount is seen")
        assert look() == seen
    finally:
        subprocess.run(["/usr/bin/umount", "--lazy", target], check=True)


@pytest.mark.parametrize(
    ("path", "written"),
    [("ro", False), ("ro/inner", True), ("rro", False), ("rro/inner", False)],
)
def test_a_read_only_volume_covers_the_mounts_below_it_only_if_recursive(
    box: ByHand, outer: Path, path: str, written: bool
) -> None:
    said = box.output("sh", "-c", f"touch /{path}/file 2>&1 || true")
    assert ("Read-only file system" in said) is not written
    assert [found.parent for found in outer.rglob("file")] == ([outer / "inner"] if written else [])
    if written:
        (outer / "inner" / "file").unlink()


def test_a_block_device_that_the_host_does_not_have_is_refused(one_stack: Stack, tmp_path: Path) -> None:
    linux = {"devices": [{"path": "/dev/data", "type": "b", "major": 259, "minor": 1048575}]}
    box = ByHand(one_stack, tmp_path, linux=linux)
    with pytest.raises(grpc.RpcError, match="the host has no block device 259:1048575"), box:
        pass

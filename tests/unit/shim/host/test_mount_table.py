"""How a file is found in the host's mount table."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from shim.host.mount_table import FilePlace, HostMount, MountTable, inside

if TYPE_CHECKING:
    from pathlib import Path

LINES = rb"""
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
21 20 0:30 / /run rw,nosuid,nodev shared:2 - tmpfs tmpfs rw
22 20 8:1 /var/data /srv/with\040space ro,noexec,relatime shared:1 - ext4 /dev/sda1 rw
23 20 8:1 / /other rw,idmapped master:1 - ext4 /dev/sda1 rw
""".strip().splitlines()


def mount(root: str, point: str, *options: str, number: int = 1) -> HostMount:
    return HostMount(number, "8:1", root, point, frozenset(options), "ext4")


@pytest.mark.parametrize(
    ("root", "point", "real", "path"),
    [
        ("/", "/", "/var/data", "/var/data"),
        ("/", "/", "/", "/"),
        ("/", "/mnt", "/mnt", "/"),
        ("/var", "/mnt", "/mnt/data", "/var/data"),
        ("/var/data", "/mnt", "/mnt", "/var/data"),
    ],
)
def test_a_file_has_the_same_path_in_its_file_system_through_each_mount(
    root: str, point: str, real: str, path: str
) -> None:
    assert FilePlace(mount(root, point), real).path == path


def test_an_idmapped_mount_counts_as_another_file_system() -> None:
    plain, mapped = FilePlace(mount("/", "/"), "/"), FilePlace(mount("/", "/", "idmapped", number=7), "/")
    assert plain.file_system != mapped.file_system


def test_a_directory_has_a_path_through_each_mount_that_shows_it() -> None:
    table = MountTable(LINES)
    place = FilePlace(mount("/", "/"), "/var/data/file")
    names = ["/var/data/file", "/var/data/file", "/srv/with space/file", "/other/var/data/file"]
    assert table.names_of(place) == names


@pytest.mark.parametrize(
    ("path", "directory", "below"),
    [("/a", "/a", ""), ("/a/b", "/a", "b"), ("/a", "/", "a"), ("/ab", "/a", None), ("/a", "/a/b", None)],
)
def test_a_path_is_compared_with_a_directory_by_whole_names(
    path: str, directory: str, below: str | None
) -> None:
    assert inside(path, directory) == below


def test_an_open_file_is_found(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_PATH)
    try:
        place = MountTable.read().locate(descriptor)
    finally:
        os.close(descriptor)
    assert place.real == str(tmp_path.resolve())
    assert tmp_path.is_relative_to(place.mount.point)


def test_a_mount_below_a_path_counts_unless_another_hides_it() -> None:
    seen = {each.point for each in MountTable.read().below("/")}
    assert "/proc" in seen
    assert "/" not in seen
    assert MountTable(LINES).below("/") == []  # none of them is really visible there

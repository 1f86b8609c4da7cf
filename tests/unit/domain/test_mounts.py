"""Mount options become the arguments of mount(2)."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from shim import mounts
from shim.errors import InvalidArgument
from shim.mounts import MountOptions, parse_options

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], MountOptions(0, "")),
        (["ro"], MountOptions(1, "")),
        (["ro", "rw"], MountOptions(0, "")),
        (["nosuid", "nodev", "noexec"], MountOptions(2 | 4 | 8, "")),
        (["rbind", "ro"], MountOptions(4096 | 16384 | 1, "")),
        (
            ["lowerdir=/a:/b", "upperdir=/c", "index=off"],
            MountOptions(0, "lowerdir=/a:/b,upperdir=/c,index=off"),
        ),
        (["ro", "size=64k"], MountOptions(1, "size=64k")),
    ],
)
def test_flags_and_data_are_told_apart(options: list[str], expected: MountOptions) -> None:
    assert parse_options(options) == expected


def test_files_and_directories_can_be_shared(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path, tmp_path / "file", tmp_path / "link"):
        mounts.require_shareable(path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fifo", "is a FIFO of the host"),
        ("socket", "is a socket of the host"),
        ("none", "No such file"),
        ("dangling", "No such file"),
        ("nul\0", "null byte"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_what_it_is(tmp_path: Path, name: str, why: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("none")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
        with pytest.raises(InvalidArgument, match=why):
            mounts.require_shareable(tmp_path / name)

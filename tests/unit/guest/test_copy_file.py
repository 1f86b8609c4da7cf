"""CopyFile stays inside its root, and each file appears only when it is complete."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from guest.agent import copy_file
from guest.agent.errors import InvalidArgument
from guest.agent.wire import Codec, Message
from guest.image import schema

if TYPE_CHECKING:
    from pathlib import Path

CODEC = Codec(schema.messages())


def request(path: Path, **fields: object) -> Message:
    return CODEC.new(
        "grpc.CopyFileRequest",
        path=str(path),
        uid=os.getuid(),
        gid=os.getgid(),
        **{"file_mode": stat.S_IFREG | 0o640, **fields},
    )


def test_a_file_appears_when_its_last_chunk_arrives(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "file"
    copy_file.copy(request(target, data=b"hello ", file_size=11), roots=(str(tmp_path),))
    assert not target.exists()
    copy_file.copy(request(target, data=b"world", offset=6, file_size=11), roots=(str(tmp_path),))
    assert target.read_bytes() == b"hello world"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_an_empty_file_takes_one_message(tmp_path: Path) -> None:
    copy_file.copy(request(tmp_path / "empty"), roots=(str(tmp_path),))
    assert (tmp_path / "empty").read_bytes() == b""


def test_directories_and_links_are_created(tmp_path: Path) -> None:
    copy_file.copy(request(tmp_path / "d", file_mode=stat.S_IFDIR | 0o711), roots=(str(tmp_path),))
    copy_file.copy(request(tmp_path / "l", file_mode=stat.S_IFLNK, data=b"/etc"), roots=(str(tmp_path),))
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o711
    assert (tmp_path / "l").readlink().as_posix() == "/etc"


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/../x", "{root}", "{root}//x", "{root}/a/./b"])
def test_paths_outside_are_refused(tmp_path: Path, path: str) -> None:
    copied = request(tmp_path)
    copied.path = path.format(root=tmp_path)
    with pytest.raises(InvalidArgument, match="not a plain path"):
        copy_file.copy(copied, roots=(str(tmp_path),))


def test_a_link_on_the_way_is_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    with pytest.raises(OSError, match="link"):
        copy_file.copy(request(root / "link" / "file"), roots=(str(root),))
    assert list(outside.iterdir()) == []

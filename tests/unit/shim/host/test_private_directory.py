"""Only its maker may write in a private directory, with any umask."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from shim.host import private_directory

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_every_new_directory_is_closed_to_others(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        private_directory.make(str(tmp_path / "above" / "below"))
    finally:
        os.umask(previous)

    assert [mode(tmp_path / "above"), mode(tmp_path / "above" / "below")] == [0o700, 0o700]


def test_an_existing_directory_is_left_unchanged(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    private_directory.make(str(tmp_path))

    assert mode(tmp_path) == 0o755


@pytest.mark.parametrize("bits", [0o720, 0o702, 0o777])
def test_a_directory_that_others_may_write_in_is_refused(tmp_path: Path, bits: int) -> None:
    tmp_path.chmod(bits)

    with pytest.raises(PermissionError, match="chmod it to 0700"):
        private_directory.make(str(tmp_path))


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)

    with pytest.raises(NotADirectoryError):
        private_directory.make(str(tmp_path / "link"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)

    with pytest.raises(PermissionError, match="chown it to root"):
        private_directory.make(str(tmp_path))


def test_a_directory_that_is_removed_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "box"
    chmod = os.chmod

    def removed_once(*arguments: Any) -> None:
        monkeypatch.setattr(os, "chmod", chmod)
        path.rmdir()
        chmod(*arguments)

    monkeypatch.setattr(os, "chmod", removed_once)

    private_directory.make(str(path))

    assert path.is_dir()
    assert os.chmod is chmod


def test_a_directory_below_a_dangling_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "missing")

    with pytest.raises(FileNotFoundError):
        private_directory.make(str(tmp_path / "link" / "below"))

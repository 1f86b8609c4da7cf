"""A file without a name is on a disk, and nobody but root can open it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.host import unnamed_file

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_file_has_no_name_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    directory = tmp_path / "parked"

    descriptor = unnamed_file.make(str(directory))
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)

    assert list(directory.iterdir()) == []
    assert (status.st_nlink, stat.S_IMODE(status.st_mode)) == (0, 0o600)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_file_system_without_unnamed_files_gets_one_whose_name_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening: Callable[..., int] = os.open

    def open_named(path: str, flags: int, *more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opening(path, flags, *more)

    monkeypatch.setattr(unnamed_file.os, "open", open_named)
    descriptor = unnamed_file.make(str(tmp_path / "parked"))
    try:
        assert os.fstat(descriptor).st_nlink == 0
    finally:
        os.close(descriptor)


def test_a_directory_in_memory_is_refused() -> None:
    path = Path("/dev/shm", f"hako-test-{os.getpid()}")
    try:
        with pytest.raises(OSError, match=r"is in memory \(tmpfs\)"):
            unnamed_file.make(str(path))
    finally:
        path.rmdir()


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    with pytest.raises(PermissionError, match="others"):
        unnamed_file.make(str(tmp_path))

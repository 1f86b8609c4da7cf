"""A directory that is opened alone has nothing above it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from hypervisor.lone_mount import open_alone

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_no_path_leads_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").touch()

    descriptor = open_alone(tmp_path / "inside")

    try:
        os.close(os.open("made", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, dir_fd=descriptor))
        assert (tmp_path / "inside/made").exists()
        with pytest.raises(FileNotFoundError):
            os.stat("../outside", dir_fd=descriptor)
        assert os.path.samestat(os.stat("..", dir_fd=descriptor), os.fstat(descriptor))
    finally:
        os.close(descriptor)


def test_an_absent_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        open_alone(tmp_path / "absent")

"""A guest may look at more files than the host's file server may have open."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.bundled import bind, run, unpacked
from tests.e2e.conftest import FEW_FILES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

COUNT = FEW_FILES + FEW_FILES // 4


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    """A root file system, and a place for mounts."""
    with unpacked(home) as directory:
        yield directory


def test_a_directory_of_more_files_than_the_server_may_open_can_be_listed(
    stack_of_few_files: Stack, place: Path
) -> None:
    with tempfile.TemporaryDirectory(dir=place) as directory:
        for number in range(COUNT):
            Path(directory, f"{number}").touch()
        output = run(
            stack_of_few_files,
            place,
            "echo kept >/mounted/file",
            "ls -ln /many | wc -l",
            "cat /mounted/file; ls /bin/busybox; grep -c ' /many ' /proc/mounts",
            mounts=[
                bind(Path(directory), "/many", "rbind", "ro"),
                {"destination": "/mounted", "type": "tmpfs", "source": "tmpfs"},
            ],
        )
    assert output.split() == [str(COUNT + 1), "kept", "/bin/busybox", "1"]

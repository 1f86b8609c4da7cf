"""A path is followed only if no part of it is a link."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from guest.agent import files
from tests.descriptors import descriptors


def test_a_file_is_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("text")
    descriptor = files.open_path(f"{tmp_path}//a/./file")
    try:
        assert Path(f"/proc/self/fd/{descriptor}").read_text() == "text"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("link", errno.ELOOP),
        ("link/file", errno.ELOOP),
        ("a/..", errno.ELOOP),
        ("none", errno.ENOENT),
        ("a/none/file", errno.ENOENT),
    ],
)
def test_a_link_is_not_followed_and_no_descriptor_leaks(tmp_path: Path, path: str, number: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    before = descriptors()
    with pytest.raises(OSError, match=os.strerror(number)) as refused:
        files.open_path(f"{tmp_path}/{path}")
    assert refused.value.errno == number
    assert descriptors() <= before

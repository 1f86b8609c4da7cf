"""The image build with the distribution's real packages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from guest.image import ImageError, build

CACHE = Path("/var/cache/hako")  # where scripts/setup downloaded them


def build_into(output: Path) -> list[str]:
    lines: list[str] = []
    build(output, CACHE, progress=lines.append)
    return lines


def files_below(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.timeout(300)
def test_two_builds_are_identical_and_a_third_does_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert build_into(first)[-1].startswith("done: ")
    build_into(second)
    for name in ("vmlinux", "initrd", "image.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert files_below(first / "modules") == files_below(second / "modules")
    before = (first / "initrd").stat().st_mtime_ns
    assert build_into(first)[-1].startswith("up to date: ")
    assert (first / "initrd").stat().st_mtime_ns == before


def test_kernel_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="belong together"):
        build(tmp_path, CACHE, kernel=Path("/boot/vmlinuz"), progress=print)

"""The image build with the distribution's real packages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from guest.image import ImageError, build

CACHE = Path("/var/cache/hako")  # where scripts/setup downloaded them
INSTALLED = Path("/var/lib/hako/guest")  # what scripts/setup built of the same sources


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
def test_a_build_makes_the_image_that_is_installed_and_another_build_does_nothing(tmp_path: Path) -> None:
    assert build_into(tmp_path)[-1].startswith("done: ")
    for name in ("vmlinux", "initrd", "image.json"):
        assert (tmp_path / name).read_bytes() == (INSTALLED / name).read_bytes(), name
    assert files_below(tmp_path / "modules") == files_below(INSTALLED / "modules")
    before = (tmp_path / "initrd").stat().st_mtime_ns
    assert build_into(tmp_path)[-1].startswith("up to date: ")
    assert (tmp_path / "initrd").stat().st_mtime_ns == before


def test_kernel_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="belong together"):
        build(tmp_path, CACHE, kernel=Path("/boot/vmlinuz"), progress=print)

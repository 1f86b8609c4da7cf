"""A machine reserves the huge pages that a container may use, or refuses the container."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest.agent import huge_pages
from guest.agent.errors import AgentError

MIB = 1 << 20
SIZE = 2 * MIB


class Pool:
    """The kernel's file with the number of 2 MiB pages; the kernel can make only so many."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, room: int) -> None:
        self._path = root / "hugepages-2048kB" / "nr_hugepages"
        self._path.parent.mkdir()
        self._path.write_text("0\n", encoding="ascii")
        self.room = room
        monkeypatch.setattr(huge_pages, "_POOLS", str(root))
        monkeypatch.setattr(huge_pages, "_wanted", {})
        monkeypatch.setattr(huge_pages.files, "write", self._write)
        self.compacted = 0

    @property
    def pages(self) -> int:
        """The number of pages."""
        return int(self._path.read_text(encoding="ascii"))

    def _write(self, path: str, text: str) -> None:
        if path == huge_pages._COMPACT:
            self.compacted += 1
            return
        with Path(path).open("r+", encoding="ascii") as file:  # the kernel never makes one
            file.truncate()
            file.write(str(min(int(text), self.room)))


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """A machine with room for ten pages."""
    return Pool(tmp_path, monkeypatch, room=10)


def test_each_container_reserves_its_own_pages_and_gives_them_back(pool: Pool) -> None:
    huge_pages.reserve("a", {SIZE: 3 * MIB})
    huge_pages.reserve("b", {SIZE: 8 * MIB})
    assert pool.pages == 2 + 4
    huge_pages.reserve("b", {SIZE: 2 * MIB})
    assert pool.pages == 2 + 1
    huge_pages.release("a")
    huge_pages.release("never")
    assert pool.pages == 1


def test_a_container_that_needs_more_pages_than_fit_is_refused(pool: Pool) -> None:
    huge_pages.reserve("a", {SIZE: 12 * MIB})
    with pytest.raises(AgentError, match=r"there is memory for 10 of 11 pages of 2048 KiB; lower the limit"):
        huge_pages.reserve("b", {SIZE: 10 * MIB})
    assert (pool.pages, pool.compacted) == (6, 1)


def test_a_page_size_without_hardware_support_is_refused(pool: Pool) -> None:
    with pytest.raises(AgentError, match="none of 1048576 KiB; use another size"):
        huge_pages.reserve("a", {1 << 30: 1 << 30})
    assert not huge_pages.is_known("1GB")
    assert not huge_pages.is_known("1TB")
    assert huge_pages.is_known("2MB")


@pytest.mark.parametrize("size", ["", "MB", "2", "2mb", "-2MB", "2.5GB"])
def test_a_malformed_size_is_refused(size: str) -> None:
    with pytest.raises(AgentError, match="write it like 2MB"):
        huge_pages.size_of(size)

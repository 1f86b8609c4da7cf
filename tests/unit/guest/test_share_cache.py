"""How often a guest counts the files of the share that it remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from guest.agent import share_cache

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("remembered", "limit", "wanted_s"),
    [(0, 20_000, 0.2), (5_000, 20_000, 0.1), (10_000, 20_000, 0.05), (0, 1_000_000, 10.0)],
)
def test_the_next_count_comes_before_half_of_the_limit_can_be_reached(
    remembered: int, limit: int, wanted_s: float
) -> None:
    assert share_cache.interval_s(remembered, limit) == pytest.approx(wanted_s)


@pytest.mark.parametrize(("limit", "most_open"), [(20_000, "6666"), (1_000_000, "")])
def test_open_files_are_bounded_only_if_the_server_may_open_few(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, most_open: str
) -> None:
    file_max = tmp_path / "file-max"
    file_max.touch()
    monkeypatch.setattr(share_cache, "_MOST_OPEN", str(file_max))
    monkeypatch.setattr(share_cache, "_limit", 1)  # another task counts already

    share_cache.keep_below(limit)

    assert file_max.read_text() == most_open

"""A node's journal: shims append entries, and a reader yields each entry once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.telemetry import journal
from shim.telemetry.journal import Journal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def numbers(reader: Journal) -> list[int]:
    return [entry["number"] for entry in reader.read()]


def test_each_entry_is_read_once(tmp_path: Path) -> None:
    reader = Journal(tmp_path)
    assert numbers(reader) == []
    Journal(tmp_path).note("start", {"number": 1})
    assert numbers(reader) == [1]
    Journal(tmp_path).note("start", {"number": 2})
    assert numbers(reader) == [2]
    assert numbers(reader) == []
    assert numbers(Journal(tmp_path)) == [1, 2]


def test_a_line_that_is_not_complete_is_read_later(tmp_path: Path) -> None:
    writer, reader = Journal(tmp_path), Journal(tmp_path)
    writer.note("start", {"number": 1})
    with writer.path.open("a") as file:
        file.write('{"number": ')
    assert numbers(reader) == [1]
    with writer.path.open("a") as file:
        file.write("2}\nno JSON\n[]\n")
    assert numbers(reader) == [2]


def test_nothing_is_lost_when_a_journal_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_BYTES", 200)
    writer, reader = Journal(tmp_path), Journal(tmp_path)
    seen = []
    for number in range(30):
        writer.note("start", {"number": number})
        if number % 3 == 0:
            seen += numbers(reader)
    seen += numbers(reader)

    assert seen == list(range(30))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 600


def test_a_directory_that_cannot_be_written_to_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")

    Journal(tmp_path / "file").note("start", {})

    assert "metrics lack it" in caplog.text

"""A specification is decoded once, and again only after a change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from shim.host import spec_file

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The specifications that were decoded since the test began."""
    texts: list[bytes] = []
    original = json.loads

    def loads(text: bytes) -> object:
        texts.append(text)
        return original(text)

    monkeypatch.setattr(spec_file.json, "loads", loads)
    return texts


def test_a_specification_is_decoded_once(tmp_path: Path, decoded: list[bytes]) -> None:
    (tmp_path / "config.json").write_text('{"hostname": "a"}')
    assert [spec_file.read(str(tmp_path)) for _ in range(3)] == [{"hostname": "a"}] * 3
    assert len(decoded) == 1


def test_a_specification_that_was_replaced_is_decoded_again(tmp_path: Path, decoded: list[bytes]) -> None:
    for name in ("a", "b"):
        (tmp_path / "new").write_text(json.dumps({"hostname": name}))
        (tmp_path / "new").rename(tmp_path / "config.json")
        assert spec_file.read(str(tmp_path)) == {"hostname": name}
    assert len(decoded) == 2


def test_bundles_do_not_share_a_specification(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"hostname": name}))
    found = [spec_file.read(str(tmp_path / name)) for name in ("a", "b", "a")]
    assert found == [{"hostname": name} for name in ("a", "b", "a")]


def test_a_specification_that_failed_to_decode_is_not_remembered(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="Expecting property name"):
            spec_file.read(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert spec_file.read(str(tmp_path)) == {}

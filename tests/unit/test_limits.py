"""The documented limits are those that the tests call inherent, and no others."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = re.compile(r'mark\.inherent\(\s*"([^"]+)"')
ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def test_every_inherent_limit_is_documented_and_every_documented_one_is_tested() -> None:
    tests = (path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py"))
    marked = {name for text in tests for name in MARK.findall(text)}

    assert marked == set(ROW.findall((ROOT / "docs/limits.md").read_text(encoding="utf-8")))

"""The documented limits are exactly those that the tests mark as inherent."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = re.compile(r'mark\.inherent\(\s*"([^"]+)"')
ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def test_documented_and_tested_inherent_limits_agree() -> None:
    tests = (path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py"))
    marked = {name for text in tests for name in MARK.findall(text)}

    assert marked == set(ROW.findall((ROOT / "docs/limits.md").read_text(encoding="utf-8")))

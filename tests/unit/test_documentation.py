"""The documentation says what the code does, and every link in it leads somewhere."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from scripts import document
from scripts.document import ROOT, pages
from tests.documentation import Example, commands_elsewhere, examples

if TYPE_CHECKING:
    from pathlib import Path

README_LINES = 150
COMMANDS = ROOT / "docs/commands.md"
MERGE_MARK = re.compile(r"^(?:<<<<<<<|>>>>>>>) .*$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_tables_agree_with_the_code(page: Path) -> None:
    if page == COMMANDS and sys.version_info >= (3, 13):
        pytest.skip("argparse lays help out in another way than the Python that wrote this page")

    assert list(document.stale([page])) == [], "run: .venv/bin/python -m scripts.document"


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"{example.page}: {example.commands[0]}")
def test_an_example_is_run_or_says_why_not(example: Example) -> None:
    assert example.mark
    assert example.commands


def test_every_command_is_in_an_example() -> None:
    assert commands_elsewhere() == [], "begin the block with ```console, and say whether it is run"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_merge_conflict_is_left(page: Path) -> None:
    assert MERGE_MARK.findall(page.read_text(encoding="utf-8")) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES

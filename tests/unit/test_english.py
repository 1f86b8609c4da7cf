"""Prose avoids constructions that make a reader stumble; these can be found mechanically."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("shim", "hypervisor", "guest", "proto", "scripts", "tests", "docs")
#: "Whoever" and its relatives; "a name that is no number" instead of "a name that is not a number"; "for" in
#: the sense of "because"; "for ever"; "process'" as a possessive; a word written twice; a stray article.
AVOIDED = re.compile(
    r"\bwh(?:o|om|at|ich)ever\b"
    r"|\b(?:that|which|who|what) (?:is|are|was|were) no (?!longer\b|more\b)"
    r"|, for (?:it|they|this|these|there|the \w+) (?:is|are|was|were|has|have|had|can|may|must|will|would)\b"
    r"|\bfor ever\b"
    r"|(?<!['\"`\w])process'(?!\w)"
    r"|(?<![\w./-])(?P<twice>an?|the|and|of|to|in|is|by|with) (?P=twice)(?![\w.-])"
    r"|(?<![\w./-])(?:an?|the) (?:how|what|when|where|why|after|before|if|it|this|these)\b",
    re.IGNORECASE,
)

TEST_NAME = re.compile(r"\bdef test_(\w+)")


def avoided(text: str) -> list[str]:
    """Each avoided construction in a text, with the word that follows."""
    joined = re.sub(r"\n\s*(?:#:?|//)? *", " ", TEST_NAME.sub(lambda name: name[1].replace("_", " "), text))
    return [joined[found.start() : found.end() + 20] for found in AVOIDED.finditer(joined)]


@pytest.mark.parametrize(
    "text",
    [
        "whoever asks",
        "Whatever it is",
        "a name that is no path",
        "a file, which\n    # is no link",
        "It waits, for it has no lock.",
        "It waits for ever.",
        "a process' exit code",
        "A a file",
        "part of the\n    the tree",
        "A How long to wait",
        "def test_what_is_no_path(",
    ],
)
def test_an_avoided_construction_is_found(text: str) -> None:
    assert len(avoided(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "there is no file",
        "a file that is no longer there",
        "that is not a file",
        "a wait for it is short",
        "the kind 'process' is known",
        "moved to a/a and b-a a-b",
    ],
)
def test_plain_words_are_left_alone(text: str) -> None:
    assert avoided(text) == []


def test_prose_is_plain() -> None:
    files = [path for place in PLACES for path in (ROOT / place).rglob("*") if path != Path(__file__)]
    prose = [ROOT / "README.md", *(path for path in files if path.suffix in {".py", ".md", ".proto"})]
    found = {str(path.relative_to(ROOT)): avoided(path.read_text(encoding="utf-8")) for path in prose}

    assert len(prose) > 500
    assert {path: words for path, words in found.items() if words} == {}

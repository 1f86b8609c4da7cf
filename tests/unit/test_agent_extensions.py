"""Hako's additions to Kata's protocol are defined once, under ``proto/``, and documented."""

from __future__ import annotations

import ast
import functools
import re
from typing import TYPE_CHECKING

import pytest

from proto import extensions
from proto.kata import agent_pb2, csi_pb2, oci_pb2, types_pb2
from scripts import document
from scripts.document import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OWN_FIELDS = range(1001, 1100)
SIDES = ("shim", "hypervisor", "guest")
WORDS = {name: value for name, value in vars(extensions).items() if name.isupper() and name[0] != "_"}
#: Too common to be recognized by their value: any number may be a port, and "hako" names the whole project.
COMMON = {"AGENT_PORT", "FEATURE"}


#: Only one side needs these. The agent is told the port of raw streams and the tag of the share; the host
#: reads the console without telling its lines apart.
ONE_SIDED = {"shim": {"CONSOLE_MARK"}, "guest": {"RAW_STREAM_PORT", "SHARE_TAG"}}


def literals(path: Path) -> Iterator[object]:
    """Yield every text and number in a module's code, except docstrings."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Constant):
            yield node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
        pending += ast.iter_child_nodes(node)


@functools.cache
def literals_of_both_sides() -> dict[str, set[object]]:
    """The literals of each module, by its path."""
    paths = [path for side in SIDES for path in (ROOT / side).rglob("*.py")]
    return {str(path.relative_to(ROOT)): set(literals(path)) for path in paths}


def repeats(literal: object, word: str | int) -> bool:
    """Whether a literal is a word or contains it."""
    if isinstance(word, str):
        return isinstance(literal, str) and bool(re.search(rf"(?<![\w.]){re.escape(word)}", literal))
    return literal == word


@pytest.mark.parametrize("name", sorted(WORDS.keys() - COMMON))
def test_neither_side_repeats_a_word_of_the_protocol(name: str) -> None:
    found = {
        path
        for path, found in literals_of_both_sides().items()
        if any(repeats(literal, WORDS[name]) for literal in found)
    }

    assert found == set(), f"take proto.extensions.{name}"


@pytest.mark.parametrize("side", ["shim", "guest"])
def test_each_word_is_used_by_both_sides(side: str) -> None:
    sides = [side] if side == "guest" else ["shim", "hypervisor"]
    names = {
        alias.name
        for one in sides
        for path in (ROOT / one).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "proto.extensions"
        for alias in node.names
    }

    assert WORDS.keys() - names == ONE_SIDED[side]


def test_each_word_has_a_docstring() -> None:
    rows = document.agent_words().splitlines()[2:]

    assert len(rows) == len(WORDS)
    assert [row for row in rows if not row.split("|")[3].strip()] == []


def test_each_field_that_hako_adds_is_documented() -> None:
    files = (agent_pb2.DESCRIPTOR, csi_pb2.DESCRIPTOR, oci_pb2.DESCRIPTOR, types_pb2.DESCRIPTOR)
    messages = [message for file in files for message in file.message_types_by_name.values()]
    own = {(one.name, field.name) for one in messages for field in one.fields if field.number in OWN_FIELDS}
    table = document.agent_fields()

    assert own
    assert {pair for pair in own if f"| `{pair[0]}` | `{pair[1]}` | " not in table} == set()

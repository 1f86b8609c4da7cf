"""The console examples of the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from scripts.document import ROOT, pages

_EXAMPLE = re.compile(r"(?:<!-- (run|not run: [^\n]+) -->\n)?```console\n(.*?)```", re.DOTALL)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Example:
    """A block of commands.

    :param page: the page's path below the root of the tree.
    :param mark: ``run``, ``not run: <reason>``, or empty if it has no mark.
    :param commands: the lines that begin with a prompt.
    """

    page: str
    mark: str
    commands: tuple[str, ...]


def commands_elsewhere() -> list[str]:
    """List the lines with commands in blocks that do not say that they are examples."""
    blocks = [block for page in pages() for block in _BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [line for kind, body in blocks if not kind for line in body.splitlines() if line.startswith("# ")]


def examples() -> list[Example]:
    """List the examples of all pages in order."""
    return [
        Example(
            page=str(page.relative_to(ROOT)),
            mark=mark,
            commands=tuple(line[2:] for line in body.splitlines() if line.startswith("# ")),
        )
        for page in pages()
        for mark, body in _EXAMPLE.findall(page.read_text(encoding="utf-8"))
    ]

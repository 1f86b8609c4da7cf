"""Generate the documentation's tables from code: ``python -m scripts.document``.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from proto import extensions
from shim import cli, config
from shim.agent import oci_fields
from shim.machine import pod_annotations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(?<=<!-- generated: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
_HELP_COLUMNS = "100"
_OWN_NUMBER = r"10\d\d"  # fields that Hako adds to Kata's messages


def configuration() -> str:
    """Return a table of every key of the configuration."""
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for section, kind in config.SECTIONS.items():
        for name, key in kind.KEYS.items():
            cells = (f"`[{section}] {name}`", _value(key.default), _values_of(key), key.help)
            lines.append(f"| {' | '.join(cells).replace('``', '`')} |")
    return "\n".join(lines)


def _values_of(key: config.Key) -> str:
    if key.choices or isinstance(key.default, bool):
        return ", ".join(f"`{choice}`" for choice in key.values().split(", "))
    return f"{key.values()} {key.unit}".rstrip()


def _value(value: object) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else ""


def annotations_of_pods() -> str:
    """Return a table of the annotations for pods."""
    lines = ["| annotation | sets | values | allowed by default |", "|---|---|---|---|"]
    for each in pod_annotations.ANNOTATIONS.values():
        values = ", ".join(f"`{value}`" for value in each.only) or _values_of(each.declaration)
        if each.adds:
            values = f"{values}, appended"
        if each.fraction:
            values = f"{values}, rounded up"
        allowed = f"no: {each.risk}" if each.risk else "yes"
        lines.append(f"| `{each.name}` | `[{each.section}] {each.key}` | {values} | {allowed} |")
    lines += [
        f"| `{fact.name}` | nothing: Hako always does so | `{', '.join(fact.values)}` | yes |"
        for fact in pod_annotations.FACTS.values()
    ]
    return "\n".join(lines)


def oci() -> str:
    """Return a table of every field of the runtime specification."""
    lines = ["| field | treatment | why |", "|---|---|---|"]
    lines += [f"| `{row.path}` | {row.fate.value} | {row.why} |" for row in oci_fields.ROWS]
    return "\n".join(lines)


def agent_words() -> str:
    """Return a table of the constants of the agent's protocol in ``proto/extensions.py``."""
    lines = ["| name | value | what it is for | with another agent |", "|---|---|---|---|"]
    meaning = ""
    for line in inspect.getsource(extensions).splitlines():
        if line.startswith("#: "):
            meaning = f"{meaning} {line.removeprefix('#: ')}".strip()
        elif found := re.match(r"([A-Z][A-Z_]+) = ", line):
            lines.append(f"| {found[1]} | `{getattr(extensions, found[1])}` | {_purpose(meaning)} |")
            meaning = ""
    return "\n".join(lines)


def agent_fields() -> str:
    """Return a table of the fields that Hako adds to messages of Kata's protocol."""
    lines = ["| message | field | what it is for | with another agent |", "|---|---|---|---|"]
    for path in sorted((ROOT / "proto/kata").glob("*.proto")):
        message, meaning = "", ""
        for line in path.read_text(encoding="utf-8").splitlines():
            text = line.strip()
            if found := re.match(r"message (\w+) \{", text):
                message = found[1]
            elif text.startswith("// "):
                meaning = f"{meaning} {text.removeprefix('// ')}".strip()
                continue
            elif found := re.match(rf"[\w. ]+ (\w+) = {_OWN_NUMBER};", text):
                lines.append(f"| `{message}` | `{found[1]}` | {_purpose(meaning)} |")
            meaning = ""
    return "\n".join(lines)


def _purpose(meaning: str) -> str:
    """Split a comment into the cells for its two parts."""
    purpose, _, without = meaning.partition(" Without: ")
    return f"{purpose} | {without[:1].upper()}{without[1:]}".rstrip()


def commands() -> str:
    """Return the help of each command."""
    os.environ["COLUMNS"] = _HELP_COLUMNS
    return "\n\n".join(_helps(cli.parser()))


def _helps(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"```\n{parser.format_help().rstrip()}\n```"
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to its subcommands
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for each in action.choices.values():
                yield from _helps(each)


TABLES: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "annotations": annotations_of_pods,
    "oci": oci,
    "commands": commands,
    "agent-words": agent_words,
    "agent-fields": agent_fields,
}


def pages() -> list[Path]:
    """List every page of the documentation."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def written_anew(text: str) -> str:
    """Return a page with its tables generated from the current code."""
    return _BLOCK.sub(lambda found: f"{found[1]}{found[2]}{TABLES[found[1]]()}\n", text)


def stale(paths: Iterable[Path]) -> list[Path]:
    """List the pages whose generated tables are out of date."""
    return [path for path in paths if (text := path.read_text(encoding="utf-8")) != written_anew(text)]


def main() -> int:
    """Regenerate the tables of all pages."""
    for path in stale(pages()):
        path.write_text(written_anew(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

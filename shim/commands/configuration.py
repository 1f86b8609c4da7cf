"""``hako config``: explain the keys, check a file, and show the effective values."""

from __future__ import annotations

import json
import os
import textwrap
from typing import TYPE_CHECKING

from shim import config
from shim.commands.columns import print_table
from shim.refusal import Refusal
from shim.telemetry import trace_export

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import Any

_WIDTH = 100


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("config", help="explain, check and show the configuration")
    actions = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    explain = actions.add_parser("explain", help="explain keys and their values")
    explain.add_argument("key", nargs="?", metavar="KEY", help="one key, as SECTION.KEY or KEY (all)")
    check = actions.add_parser("check", help="say whether a file is valid")
    check.add_argument("file", metavar="FILE", help="a configuration; - for standard input")
    show = actions.add_parser("show", help="show every value in effect, and the file that sets it")
    show.add_argument("--config", default="", metavar="PATH", help="a configuration other than the host's")
    for each in (explain, check, show):
        each.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Run the chosen subcommand.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if a file is wrong, or there is no such key.
    """
    match chosen.action:
        case "explain":
            _explain(chosen.key, as_json=chosen.json)
        case "check":
            _check(chosen.file)
            print(
                json.dumps({"file": chosen.file, "valid": True}) if chosen.json else f"{chosen.file}: valid"
            )
        case _:
            _show(chosen.config, as_json=chosen.json)
    return 0


def _check(file: str) -> None:
    endpoint = config.parse(config.located_at(file)).shim.tracing_endpoint
    if endpoint and not trace_export.is_available():
        raise Refusal(f"config: {file}: [shim] tracing_endpoint: {trace_export.MISSING}")


def _explain(wanted: str | None, *, as_json: bool) -> None:
    keys = {name: key for name, key in _keys() if wanted in {None, name, name.partition(".")[2]}}
    if not keys:
        raise Refusal(f"config: there is no key {wanted!r}; `hako config explain` lists all")
    if as_json:
        print(json.dumps({name: key.as_dict() for name, key in keys.items()}, indent=2))
        return
    for name, key in keys.items():
        unit = f" {key.unit}" if key.unit else ""
        print(f"{name} = {config.toml(key.default)}")
        print(f"  takes {key.values()}{unit}")
        print(textwrap.fill(_plain(key.help), _WIDTH, initial_indent="  ", subsequent_indent="  "))


def _show(path: str, *, as_json: bool) -> None:
    environment = {config.ENVIRONMENT_VARIABLE: path} if path else os.environ
    given = config.values_of(config.locate(environment))
    shown = {}
    for name, key in _keys():
        section, _, own = name.partition(".")
        shown[name] = given.get(section, {}).get(own) or config.Value(value=key.default)
    if as_json:
        print(json.dumps({name: each.as_dict() for name, each in shown.items()}, indent=2))
        return
    rows = [(name, each.source, config.toml(each.value)) for name, each in shown.items()]
    print_table([("KEY", "FROM", "VALUE"), *rows])


def _keys() -> Iterator[tuple[str, config.Key]]:
    for section, kind in config.SECTIONS.items():
        for name, key in kind.KEYS.items():
            yield f"{section}.{name}", key


def _plain(text: str) -> str:
    return text.replace("``", "`")

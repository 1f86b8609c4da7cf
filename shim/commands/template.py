"""``hako template``: list, build and remove templates by hand."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shim import config
from shim.commands.columns import age, print_table
from shim.errors import ShimError
from shim.machine.template_store import TemplateStore
from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from shim.config import Config
    from shim.machine.template_store import Template, TemplateEntry

_SHOWN = 12  # characters of a key: enough to tell a few templates apart
_MIB = 1 << 20


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "template", help="list, build and remove templates, from which machines are cloned"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    listing = actions.add_parser("ls", help="list the templates")
    removing = actions.add_parser("rm", help="remove templates; running clones are not affected")
    what = removing.add_mutually_exclusive_group(required=True)
    what.add_argument("key", nargs="?", metavar="KEY", help="a template's key or its beginning")
    what.add_argument("--all", action="store_true", help="every template")
    building = actions.add_parser("build", help="build the template of the configuration, unless it exists")
    building.add_argument(
        "--background",
        action="store_true",
        help="run at low priority, and stop if another process already builds",
    )
    for each in (listing, removing, building):
        each.add_argument("--json", action="store_true", help="print JSON")
        text = "a configuration other than the host's; - for standard input"
        each.add_argument("--config", default="", metavar="PATH", help=text)


def run(chosen: argparse.Namespace) -> int:
    """Run the chosen subcommand.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if it cannot be done.
    """
    settings = _settings(chosen.config)
    store = TemplateStore(Path(settings.hypervisor.template_dir))
    match chosen.action:
        case "ls":
            _print(store.entries(), as_json=chosen.json)
        case "rm":
            removed = store.remove(chosen.key or "")
            for line in [json.dumps({"removed": removed})] if chosen.json else removed:
                print(line)
        case _:
            template = _build(settings, store, in_background=chosen.background)
            values = {"key": template.key, "path": str(template.path)}
            print(json.dumps(values) if chosen.json else template.path)
    return 0


def _settings(path: str) -> Config:
    return config.parse(config.located_at(path) if path else config.locate(os.environ))


def _build(settings: Config, store: TemplateStore, *, in_background: bool) -> Template:
    from shim.machine import template_builder  # noqa: PLC0415 - imports the hypervisor

    if in_background:
        template_builder.go_to_the_background(settings)
    elif store.is_building():
        print("template: another is being built; waiting for that", file=sys.stderr)
    wait_s = 0.0 if in_background else template_builder.longest_s(settings)
    try:
        return template_builder.build(settings, store, wait_s=wait_s)
    except ShimError as error:
        raise Refusal(str(error)) from error


def _print(entries: list[TemplateEntry], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_values(entry) for entry in entries], indent=2))
        return
    rows = [("KEY", "SIZE", "BUILT", "USED", "FOR")]
    now = time.time()
    for entry in entries:
        used = "-" if entry.failure else f"{age(now - entry.used_at)} ago"
        size = "-" if entry.failure else f"{entry.size_bytes / _MIB:.0f} MiB"
        rows.append((entry.key[:_SHOWN], size, f"{age(now - entry.built_at)} ago", used, _what_for(entry)))
    print_table(rows)


def _values(entry: TemplateEntry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "size_bytes": entry.size_bytes,
        "built_at_s": entry.built_at,
        "used_at_s": entry.used_at,
        "failure": entry.failure,
        "purpose": dict(entry.purpose),
    }


def _what_for(entry: TemplateEntry) -> str:
    if entry.failure:
        return f"failed: {entry.failure}"
    asked = dict(entry.purpose)
    sizes = [f"{asked.pop('vcpus', '?')} of {asked.pop('max_vcpus', '?')} vCPUs"]
    sizes += [f"{_mib(asked, 'memory_bytes')} of {_mib(asked, 'max_memory_bytes')} MiB"]
    return ", ".join([*sizes, *(str(value) for value in asked.values() if value)])


def _mib(asked: dict[str, object], name: str) -> str:
    size = asked.pop(name, None)
    return str(size // _MIB) if isinstance(size, int) else "?"

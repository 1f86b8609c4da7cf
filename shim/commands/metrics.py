"""``hako metrics``: the metrics that ``hako monitor`` would serve now, for this node or one sandbox."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from shim.commands import shims

if TYPE_CHECKING:
    import argparse
    from typing import Any


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("metrics", help="print the metrics of this host, or of one sandbox")
    parser.add_argument("id", nargs="?", default="", metavar="ID", help="only this sandbox (all)")
    shims.add_namespace_to(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of Prometheus' text")
    shims.add_config_to(parser)


def run(chosen: argparse.Namespace) -> int:
    """Print them.

    :param chosen: the command line.
    :returns: the exit status: 1 if a shim does not answer.
    :raises Refusal: if there is no such sandbox.
    """
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - the help does not need it

    from shim.commands.monitor import NodeCollector  # noqa: PLC0415 - as above

    only = shims.one(chosen) if chosen.id else None
    registry = CollectorRegistry()
    collector = NodeCollector(shims.settings_of(chosen).shim, only=only)
    registry.register(collector)
    if not chosen.json:
        sys.stdout.write(generate_latest(registry).decode())
        return int(collector.has_missed_one)
    families = [
        {
            "name": family.name,
            "type": family.type,
            "help": family.documentation,
            "samples": [
                {"name": sample.name, "labels": sample.labels, "value": sample.value}
                for sample in family.samples
            ],
        }
        for family in registry.collect()
    ]
    print(json.dumps(families, indent=2))
    return int(collector.has_missed_one)

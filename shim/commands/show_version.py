"""``hako version``: the version of this Hako."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from shim.version import version

if TYPE_CHECKING:
    import argparse
    from typing import Any


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("version", help="print the version")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Print the version.

    :param chosen: the command line.
    :returns: the exit status.
    """
    print(json.dumps({"version": version()}) if chosen.json else version())
    return 0

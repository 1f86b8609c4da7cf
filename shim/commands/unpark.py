"""``hako unpark``: move the memory of a sandbox back, and resume it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from proto.hako import management_pb2 as api
from shim.commands import park, shims
from shim.commands.messages import as_dict

if TYPE_CHECKING:
    import argparse


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("unpark", help="move the memory of a parked sandbox back, and resume it")
    shims.add_sandbox_to(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Wake a sandbox.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if there is no such sandbox, or it does not wake.
    """
    answer = park.ask(chosen, "Unpark", api.UnparkRequest(), api.UnparkResponse)
    print(json.dumps(as_dict(answer)) if chosen.json else f"{chosen.id}: awake")
    return 0

"""``hako park``: pause a sandbox, and move its memory to a file."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.commands.columns import mib
from shim.commands.messages import as_dict
from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse

    from google.protobuf.message import Message

TIMEOUT_S = 600.0  # a large machine on a slow disk takes minutes


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("park", help="pause a sandbox, and move its memory to a file")
    shims.add_sandbox_to(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Park a sandbox.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if there is no such sandbox, or it cannot be parked.
    """
    answer = ask(chosen, "Park", api.ParkRequest(), api.ParkResponse)
    if chosen.json:
        print(json.dumps(as_dict(answer)))
    else:
        print(f"{chosen.id}: parked; {mib(answer.memory_bytes)} of memory moved to a file")
    return 0


def ask(chosen: argparse.Namespace, method: str, request: Message, reply: type[shims._M]) -> shims._M:
    """Call a method of a sandbox's shim that may take long.

    :param chosen: the command line, which names the sandbox.
    :param method: a method of the management API.
    :raises Refusal: if there is no such sandbox, or it refuses.
    """
    record = shims.one(chosen)
    [answer] = asyncio.run(
        shims.ask_all([record], lambda one: shims.ask(one, method, request, reply, timeout_s=TIMEOUT_S))
    )
    if answer.value is None:
        raise Refusal(f"{chosen.command}: {record.id}: {answer.problem}")
    return answer.value

"""``hako inspect``: everything that is known about one sandbox, as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.commands.messages import as_dict
from shim.commands.shims import TIMEOUT_S

if TYPE_CHECKING:
    import argparse

    from shim.host.state_directory import StartRecord

_GUEST_S = 0.7 * TIMEOUT_S  # so that the host's facts arrive in time


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("inspect", help="show everything about a sandbox as JSON")
    shims.add_sandbox_to(parser)
    parser.add_argument("--json", action="store_true", help="has no effect: the output is always JSON")


def run(chosen: argparse.Namespace) -> int:
    """Show it.

    :param chosen: the command line.
    :returns: the exit status: 1 if the shim does not answer.
    :raises Refusal: if there is no such sandbox.
    """
    record = shims.one(chosen)
    [answer] = asyncio.run(shims.ask_all([record], everything))
    shown = answer.value or {"id": record.id, "namespace": record.namespace, "state": "unknown"}
    print(json.dumps({**shown, "problem": answer.problem}, indent=2))
    return 1 if answer.problem else 0


async def everything(record: StartRecord) -> dict[str, Any]:
    """Ask a shim everything.

    :raises ShimError: if it does not answer.
    """
    description, usage, sources = await asyncio.gather(
        shims.ask(record, "Describe", api.DescribeRequest(), api.DescribeResponse),
        shims.ask(record, "Usage", api.UsageRequest(guest_timeout_s=_GUEST_S), api.UsageResponse),
        shims.ask(record, "LogSources", api.LogSourcesRequest(), api.LogSourcesResponse),
    )
    return {**as_dict(description), "usage": as_dict(usage), "logs": as_dict(sources)["sources"]}

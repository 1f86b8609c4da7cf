"""``hako timeline``: the phases of a sandbox's start and their times."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.refusal import Refusal
from shim.telemetry import timeline_files, timeline_model, timeline_svg
from shim.telemetry.timeline_model import Phase, Timeline

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from shim.host.state_directory import StartRecord


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("timeline", help="show the phases of a sandbox's start and their times")
    shims.add_sandbox_to(parser)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it into this file")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write it for Perfetto and Chrome")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Print the phases, or write them in the requested forms.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if no timeline of the sandbox is kept.
    """
    found = _found(chosen)
    if chosen.svg is not None:
        chosen.svg.write_text(timeline_svg.draw(found), encoding="utf-8")
    if chosen.trace is not None:
        chosen.trace.write_text(json.dumps(timeline_model.trace(found)), encoding="utf-8")
    if chosen.json:
        phases = [
            {"lane": each.lane, "name": each.name, "began_s": each.began_s, "ended_s": each.ended_s}
            for each in found.phases
        ]
        print(json.dumps(phases, indent=2))
    elif chosen.svg is None and chosen.trace is None:
        sys.stdout.write(timeline_model.table(found))
    return 0


def _found(chosen: argparse.Namespace) -> Timeline:
    """Find the timeline of a sandbox that runs, or else the newest that is kept.

    :raises Refusal: if there is neither.
    """
    log_dir = Path(shims.settings_of(chosen).shim.log_dir)
    try:
        record = shims.one(chosen)
    except Refusal:
        kept = timeline_files.of_ended(log_dir, namespace=chosen.namespace, sandbox_id=chosen.id)
        if not kept:
            raise
        return kept[-1]
    [answer] = asyncio.run(shims.ask_all([record], _ask))
    if answer.value is not None:
        return answer.value
    try:
        found = timeline_files.of_running(shims.state_of(record), title=record.id)
    except FileNotFoundError as error:
        raise Refusal(f"timeline: {record.id}: {answer.problem.removeprefix('timeline: ')}") from error
    print(f"timeline: {record.id}: {answer.problem}; it has written the lines below", file=sys.stderr)
    return found


async def _ask(record: StartRecord) -> Timeline:
    found = await shims.ask(record, "Timeline", api.TimelineRequest(), api.TimelineResponse)
    phases = (
        Phase(lane=each.lane, name=each.name, began_s=each.began_s, ended_s=each.ended_s)
        for each in found.phases
    )
    return Timeline(title=record.id, phases=tuple(phases))

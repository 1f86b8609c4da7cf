"""``hako timeline``: the phases of a sandbox's start and their times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shim.commands import shims
from shim.refusal import Refusal
from shim.telemetry import timeline_files, timeline_model, timeline_svg

if TYPE_CHECKING:
    import argparse
    from typing import Any


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("timeline", help="show the phases of a sandbox's start and their times")
    shims.add_sandbox_to(parser)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it into this file")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write it for Perfetto and Chrome")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(chosen: argparse.Namespace) -> int:
    """Print the phases, or write them in the requested forms.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if no timeline of the sandbox is kept.
    """
    settings = shims.settings_of(chosen).shim
    found = timeline_files.find(
        state_dir=Path(settings.state_dir),
        log_dir=Path(settings.log_dir),
        namespace=chosen.namespace,
        sandbox_id=chosen.id,
    )
    if not found:
        raise Refusal(f"timeline: {chosen.id}: nothing is kept of such a sandbox; see `hako ps`")
    if chosen.svg is not None:
        chosen.svg.write_text(timeline_svg.draw(found[0]), encoding="utf-8")
    if chosen.trace is not None:
        chosen.trace.write_text(json.dumps(timeline_model.trace(found[0])), encoding="utf-8")
    if chosen.json:
        phases = [
            {"lane": each.lane, "name": each.name, "began_s": each.began_s, "ended_s": each.ended_s}
            for each in found[0].phases
        ]
        print(json.dumps(phases, indent=2))
    elif chosen.svg is None and chosen.trace is None:
        sys.stdout.write(timeline_model.table(found[0]))
    return 0

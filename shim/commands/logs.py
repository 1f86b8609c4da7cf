"""``hako logs``: the output of the shim, QEMU, the daemons and the guest's console, sorted by time."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import printable
from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.commands.file_watch import FileWatch
from shim.commands.log_lines import LogFile
from shim.refusal import Refusal
from shim.telemetry import log, postmortem

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from shim.commands.log_lines import LogLine
    from shim.host.state_directory import StartRecord

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LINE = 4096


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "logs", help="show the output of shim, QEMU, daemons and guest, or why a sandbox ended"
    )
    shims.add_sandbox_to(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="show new lines as they arrive")
    parser.add_argument(
        "--since",
        default="",
        metavar="TIME",
        help="leave out older lines: 30s, 10m, 2h, 1d, or a date with a time",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: an object on each line")


def run(chosen: argparse.Namespace) -> int:
    """Show the lines of a running sandbox, or the reason and the last output of a failed one.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if there is no record of the sandbox.
    """
    since_s = since(chosen.since, now_s=time.time())
    settings = shims.settings_of(chosen).shim
    kept = postmortem.read(Path(settings.log_dir), sandbox_id=chosen.id, namespace=chosen.namespace)
    try:
        record = shims.one(chosen)
    except Refusal:
        if not kept:
            raise
        _show_kept(kept, as_json=chosen.json)
        return 0
    if not chosen.json:
        _show_kept(kept, as_json=False)
    asyncio.run(_show(record, since_s=since_s, follow=chosen.follow, as_json=chosen.json))
    return 0


def since(wanted: str, *, now_s: float) -> float:
    """Read a point in time.

    :param wanted: how long ago, or a date with a time; empty for no limit.
    :param now_s: seconds since 1970.
    :raises Refusal: if it is neither.
    """
    if not wanted:
        return 0.0
    if found := re.fullmatch(r"(\d{1,9})([smhd])", wanted):
        return now_s - int(found[1]) * _UNITS_S[found[2]]
    try:
        at = datetime.fromisoformat(wanted)
    except ValueError as error:
        raise Refusal(
            f"logs: --since {printable(wanted, limit=80)}: no time; give 30s, 10m, 2h, 1d or a date as "
            "2026-11-30T12:00:00Z"
        ) from error
    return (at if at.tzinfo else at.astimezone()).timestamp()


def _show_kept(kept: str, *, as_json: bool) -> None:
    """Print the last output of a failed sandbox, some of which its guest chose."""
    for line in kept.splitlines():
        shown = printable(line, limit=_LINE)
        print(json.dumps({"at_s": None, "source": "kept", "level": "", "text": shown}) if as_json else shown)


async def files_of(record: StartRecord) -> list[LogFile]:
    """Find the files with a sandbox's lines, even if its shim does not answer."""
    [answer] = await shims.ask_all(
        [record], lambda one: shims.ask(one, "LogSources", api.LogSourcesRequest(), api.LogSourcesResponse)
    )
    if answer.value is not None:
        return [LogFile(source.kind, Path(source.path)) for source in answer.value.sources]
    print(f"logs: {record.id}: {answer.problem}; it has written the lines below", file=sys.stderr)
    return [LogFile(kind, path) for kind, path in log.files(shims.state_of(record)).items()]


async def _show(record: StartRecord, *, since_s: float, follow: bool, as_json: bool) -> None:
    directory = shims.state_of(record)
    with FileWatch() as watch:
        watch.add(directory, contents=True)
        files = await files_of(record)
        while True:
            lines = [
                line
                for file in files
                for line in file.new_lines(unfinished=not follow)
                if line.at_s >= since_s
            ]
            for line in sorted(lines, key=lambda each: each.at_s):
                _print(line, as_json=as_json)
            sys.stdout.flush()
            if not follow or not directory.exists():
                return
            await watch.changed()


def _print(line: LogLine, *, as_json: bool) -> None:
    if as_json:
        values = {"at_s": line.at_s, "source": line.source, "level": line.level, "text": line.text}
        print(json.dumps(values))
        return
    at = datetime.fromtimestamp(line.at_s, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    level = f"{line.level}: " if line.level not in {"", "info"} else ""
    print(f"{at}  {line.source:<16}  {level}{line.text}")

"""``hako events``: the events in this host's sandboxes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.commands.columns import shown_id, text
from shim.commands.file_watch import FileWatch
from shim.commands.messages import as_dict
from shim.errors import ShimError

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from shim.host.state_directory import StartRecord

_SOCKET = "grpc.sock"
_INTERRUPTED = 128 + signal.SIGINT  # the shells' status for it
_KEPT_TIMEOUT_S = 5.0  # the server starts with the first connection


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "events", help="show the last events in the sandboxes, and each as it happens"
    )
    parser.add_argument("id", nargs="?", metavar="ID", help="only this sandbox")
    shims.add_namespace_to(parser)
    parser.add_argument("--past", action="store_true", help="show only the last events, and exit")
    parser.add_argument("--json", action="store_true", help="print JSON: an object on each line")
    shims.add_config_to(parser)


def run(chosen: argparse.Namespace) -> int:
    """Show past events, and unless only these are wanted, new ones until an interruption.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if there is no such sandbox.
    """
    if chosen.past:
        return asyncio.run(_show_past(_wanted(chosen), as_json=chosen.json))
    wanted = _wanted(chosen)[0].id if chosen.id else ""
    # Each line is written at once and no work is left, but cancelling gRPC streams may be slow.
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    asyncio.run(_follow(chosen, wanted))
    return 0


def _wanted(chosen: argparse.Namespace) -> list[StartRecord]:
    if chosen.id:
        return [shims.one(chosen)]
    return shims.records(shims.settings_of(chosen).shim.state_dir, chosen.namespace)


async def _show_past(records: list[StartRecord], *, as_json: bool) -> int:
    answers = shims.still_there(await shims.ask_all(records, _past))
    told = [(event, answer.record) for answer in answers for event in answer.value or []]
    for event, record in sorted(told, key=lambda each: each[0].at_s):
        _print(event, record, as_json=as_json)
    for answer in answers:
        if answer.problem:
            print(f"events: {answer.record.id}: {answer.problem}", file=sys.stderr)
    return 1 if any(answer.problem for answer in answers) else 0


async def _past(record: StartRecord) -> list[api.Event]:
    # A shim that answers here is not stopped, but its gRPC server may take longer to start.
    await shims.ask(record, "LogSources", api.LogSourcesRequest(), api.LogSourcesResponse)
    with shims.errors_of_grpc(_KEPT_TIMEOUT_S):
        return [event async for event in shims.stream_events(record, follow=False, timeout_s=_KEPT_TIMEOUT_S)]


async def _follow(chosen: argparse.Namespace, wanted: str) -> None:
    """Follow all sandboxes, including those that start meanwhile."""
    state_dir = Path(shims.settings_of(chosen).shim.state_dir)
    followed: set[str] = set()
    with FileWatch() as watch:
        async with asyncio.TaskGroup() as group:
            while True:
                _watch_all(watch, state_dir)
                known = shims.records(str(state_dir), chosen.namespace)
                followed.intersection_update(record.state_directory for record in known)
                for record in known:
                    path = record.state_directory
                    if path in followed or not _has_socket(record):
                        continue
                    if wanted in {"", record.id}:
                        followed.add(path)
                        group.create_task(_tell(record, followed, as_json=chosen.json))
                await watch.changed()


def _watch_all(watch: FileWatch, state_dir: Path) -> None:
    """Watch for new sandboxes and their sockets."""
    if watch.add(state_dir):
        for directory in state_dir.iterdir():
            watch.add(directory)


def _has_socket(record: StartRecord) -> bool:
    return (shims.state_of(record) / _SOCKET).exists()


async def _tell(record: StartRecord, followed: set[str], *, as_json: bool) -> None:
    """Print the events of one sandbox until its end; one that does not answer is named once."""
    try:
        await shims.ask(record, "LogSources", api.LogSourcesRequest(), api.LogSourcesResponse)
        with shims.errors_of_grpc():
            async for event in shims.stream_events(record, follow=True, timeout_s=None):
                _print(event, record, as_json=as_json)
    except ShimError as error:
        if shims.state_of(record).exists():  # otherwise it has ended
            print(f"events: {record.id}: {text(str(error))}", file=sys.stderr)
    else:
        followed.discard(record.state_directory)


def _print(event: api.Event, record: StartRecord, *, as_json: bool) -> None:
    if as_json:
        values = {"sandbox": record.id, "namespace": record.namespace, **as_dict(event)}
        print(json.dumps(values), flush=True)
        return
    at = datetime.fromtimestamp(event.at_s, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    words = [shown_id(record.id), event.topic]
    if event.container_id:
        words.append(f"container={event.container_id}")
    if event.exec_id:
        words.append(f"exec={event.exec_id}")
    if event.topic == "/tasks/exit":
        words.append(f"status={event.exit_status}")
    if event.text:
        words.append(event.text)
    print(f"{at}  {'  '.join(text(word) for word in words)}", flush=True)

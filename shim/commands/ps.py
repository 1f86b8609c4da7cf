"""``hako ps``: the sandboxes of this host and their containers."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.commands.columns import age, mib, print_table, shown_id, text
from shim.commands.messages import as_dict

if TYPE_CHECKING:
    import argparse

    from shim.commands.shims import Answer
    from shim.host.state_directory import StartRecord

_HEADING = ("SANDBOX", "NAMESPACE", "POD", "STATE", "AGE", "MEMORY", "VERSION", "CONTAINERS")


@dataclass(frozen=True, slots=True)
class Seen:
    """A shim's report on its sandbox.

    :param description: its description.
    :param usage: the usage of its processes.
    """

    description: api.DescribeResponse
    usage: api.UsageResponse

    @property
    def memory_bytes(self) -> int:
        """The host memory of all its processes."""
        return sum(each.memory_bytes for each in self.usage.processes)


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("ps", help="list running sandboxes and their containers")
    shims.add_namespace_to(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    shims.add_config_to(parser)


def run(chosen: argparse.Namespace) -> int:
    """List them.

    :param chosen: the command line.
    :returns: the exit status: 1 if a shim does not answer.
    """
    records = shims.records(shims.settings_of(chosen).shim.state_dir, chosen.namespace)
    answers = shims.still_there(asyncio.run(shims.ask_all(records, look_at)))
    if chosen.json:
        print(json.dumps([_values(each) for each in answers], indent=2))
    else:
        print_table([_HEADING, *(_row(each) for each in answers)])
    return 1 if any(each.problem for each in answers) else 0


async def look_at(record: StartRecord) -> Seen:
    """Ask a shim for the description and the usage of its sandbox.

    :raises ShimError: if it does not answer.
    """
    description, usage = await asyncio.gather(
        shims.ask(record, "Describe", api.DescribeRequest(), api.DescribeResponse),
        shims.ask(record, "Usage", api.UsageRequest(), api.UsageResponse),
    )
    return Seen(description, usage)


def _values(answer: Answer[Seen]) -> dict[str, Any]:
    record, seen = answer.record, answer.value
    found = as_dict(seen.description if seen else api.DescribeResponse())
    return {
        "id": record.id,
        "namespace": record.namespace,
        "pod": found["pod"],
        "state": found["state"] or "unknown",
        "created_at_s": record.started_at,
        "memory_bytes": seen.memory_bytes if seen else None,
        "version": found["version"],
        "containers": [
            {key: one[key] for key in ("id", "name", "kind", "state", "exit_status")}
            for one in found["containers"]
        ],
        "problem": answer.problem,
    }


def _row(answer: Answer[Seen]) -> tuple[str, ...]:
    record, seen = answer.record, answer.value
    began = (shown_id(record.id), record.namespace)
    old = age(time.time() - record.started_at)
    if seen is None:
        return (*began, "-", "unknown", old, "-", "-", answer.problem)
    found = seen.description
    pod = f"{found.pod.namespace}/{found.pod.name}" if found.HasField("pod") else "-"
    containers = ", ".join(_container(one) for one in found.containers if one.kind != "pause") or "-"
    if found.reason:
        containers = found.reason
    return (*began, text(pod), found.state, old, mib(seen.memory_bytes), found.version, text(containers))


def _container(one: api.Container) -> str:
    state = f"{one.state}, {one.exit_status}" if one.state == "stopped" else one.state
    return f"{one.name or shown_id(one.id)} ({state})"

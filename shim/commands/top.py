"""``hako top``: the usage of this host's sandboxes, updated every few seconds."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.commands.columns import is_screen, mib, print_table, shown_id, text
from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from shim.commands.shims import Answer
    from shim.host.state_directory import StartRecord

_HEADING = ("SANDBOX", "POD", "CPU", "MEMORY", "QEMU", "DAEMONS", "SHIM", "GUEST CPU", "GUEST MEMORY", "")
_GUEST_S = 2.0  # twice for each picture of a guest that hangs
_CLEAR = "\x1b[H\x1b[J"  # ECMA-48 CUP, ED
_LEAST_S, _MOST_S = 0.1, 3600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The usage of a sandbox so far.

    :param at_s: when its shim was asked, in seconds of ``time.monotonic()``.
    :param usage: the shim's answer.
    :param pod: the Kubernetes pod; empty if there is none.
    """

    at_s: float
    usage: api.UsageResponse
    pod: str

    @property
    def cpu_s(self) -> float:
        """The processor time of all its processes on the host."""
        return sum(each.cpu_s for each in self.usage.processes)

    @property
    def guest_cpu_s(self) -> float:
        """The processor time of its containers, as counted by the guest."""
        return sum(each.cpu_s for each in self.usage.containers)

    def memory_bytes(self, *names: str) -> int:
        """Add up the memory of its processes with these names, or of all if none is given."""
        return sum(each.memory_bytes for each in self.usage.processes if not names or each.name in names)


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("top", help="show the usage of the sandboxes; on a terminal, repeatedly")
    parser.add_argument(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="the time between two measurements",
    )
    shims.add_namespace_to(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, once")
    shims.add_config_to(parser)


def run(chosen: argparse.Namespace) -> int:
    """Show the usage: repeatedly on a terminal, otherwise once.

    :param chosen: the command line.
    :returns: the exit status: 1 if a shim does not answer.
    :raises Refusal: if the interval is out of range.
    """
    if not _LEAST_S <= chosen.interval <= _MOST_S:
        raise Refusal(f"top: --interval {chosen.interval:g}: give {_LEAST_S:g} to {_MOST_S:g}")
    records = partial(shims.records, shims.settings_of(chosen).shim.state_dir, chosen.namespace)
    live = is_screen() and not chosen.json
    return asyncio.run(_show(records, interval_s=chosen.interval, live=live, as_json=chosen.json))


async def _show(
    records: Callable[[], list[StartRecord]], *, interval_s: float, live: bool, as_json: bool
) -> int:
    before = await shims.ask_all(records(), _sample)
    while True:
        await asyncio.sleep(interval_s)
        after = shims.still_there(await shims.ask_all(records(), _sample))
        rows = [values(former(one, before), one) for one in after]
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            print(_CLEAR if live else "", end="")
            rows.sort(key=lambda row: row["cpu_percent"] or 0.0, reverse=True)
            room = shutil.get_terminal_size() if live else None
            print_table([_HEADING, *(_row(each) for each in rows)], room=room)
        if not live:
            return 1 if any(one.value is None for one in after) else 0
        before = after


async def _sample(record: StartRecord) -> Sample:
    found, usage = await asyncio.gather(
        shims.ask(record, "Describe", api.DescribeRequest(), api.DescribeResponse),
        shims.ask(record, "Usage", api.UsageRequest(guest_timeout_s=_GUEST_S), api.UsageResponse),
    )
    pod = f"{found.pod.namespace}/{found.pod.name}" if found.HasField("pod") else ""
    return Sample(time.monotonic(), usage, pod)


def former(answer: Answer[Sample], before: list[Answer[Sample]]) -> Sample | None:
    """Find the sample of the same sandbox before."""
    return next((one.value for one in before if one.record.socket_path == answer.record.socket_path), None)


def values(before: Sample | None, answer: Answer[Sample]) -> dict[str, Any]:
    """Compute the usage of a sandbox from two samples; unknown values are ``None``.

    :param before: the first sample, if there is one.
    :param answer: the second.
    """
    record, now = answer.record, answer.value
    row: dict[str, Any] = {"id": record.id, "namespace": record.namespace, "problem": answer.problem}
    if now is None:
        return row | dict.fromkeys(_NUMBERS) | {"pod": ""}
    daemons = {each.name for each in now.usage.processes} - {"QEMU", "shim"}
    cpu = guest_cpu = None
    if before is not None and now.at_s > before.at_s:
        cpu = 100 * (now.cpu_s - before.cpu_s) / (now.at_s - before.at_s)
        if not (now.usage.problem or before.usage.problem):
            guest_cpu = 100 * (now.guest_cpu_s - before.guest_cpu_s) / (now.at_s - before.at_s)
    guest = None if now.usage.problem else sum(each.memory_bytes for each in now.usage.containers)
    return row | {
        "pod": now.pod,
        "problem": now.usage.problem,
        "cpu_percent": cpu,
        "memory_bytes": now.memory_bytes(),
        "qemu_bytes": now.memory_bytes("QEMU"),
        "daemons_bytes": now.memory_bytes(*daemons) if daemons else 0,
        "shim_bytes": now.memory_bytes("shim"),
        "guest_cpu_percent": guest_cpu,
        "guest_memory_bytes": guest,
    }


_NUMBERS = (
    *("cpu_percent", "memory_bytes", "qemu_bytes", "daemons_bytes", "shim_bytes"),
    *("guest_cpu_percent", "guest_memory_bytes"),
)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    shown = ["-" if row[name] is None else _shown(name, row[name]) for name in _NUMBERS]
    return (shown_id(row["id"]), text(row["pod"]) or "-", *shown, text(row["problem"]))


def _shown(name: str, value: float) -> str:
    return f"{max(value, 0.0):.0f} %" if name.endswith("percent") else mib(value)

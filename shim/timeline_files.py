"""Timelines on disk: beside the state of a sandbox that runs, beside the last words of one that has ended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from shim import postmortem, state_directory, timeline
from shim.timeline_model import Timeline, parse, trace
from shim.timeline_svg import draw

if TYPE_CHECKING:
    from pathlib import Path


def keep(state: Path, *, log_dir: Path, namespace: str, sandbox_id: str, drawn: bool) -> None:
    """Keep the timeline of a sandbox beyond its end; the newest hundred are kept.

    :param state: its state directory.
    :param log_dir: where to.
    :param namespace: containerd's.
    :param sandbox_id: whose it is.
    :param drawn: also as a picture and as a trace.
    :raises OSError: if it cannot be read or written.
    """
    text = _path(state).read_text(encoding="utf-8", errors="replace")
    forms = {".timeline": text}
    if drawn:
        found = parse(text, title=sandbox_id)
        forms |= {".svg": draw(found), ".json": json.dumps(trace(found))}
    for suffix, content in forms.items():
        path = postmortem.path_of(log_dir, namespace=namespace, sandbox_id=sandbox_id, suffix=suffix)
        postmortem.keep(path, content)


def find(*, state_dir: Path, log_dir: Path, namespace: str, sandbox_id: str) -> list[Timeline]:
    """Read the timelines of a sandbox: those that run first.

    :param state_dir: the directory of all sandboxes' state.
    :param log_dir: where timelines are kept.
    :param namespace: containerd's; ``*`` for any.
    :param sandbox_id: whose.
    """
    paths = []
    for record_path in sorted(state_dir.glob("*/sandbox.json")):
        record = state_directory.read_record(str(record_path.parent))
        if record.id == sandbox_id and namespace in {"*", record.namespace}:
            paths.append(_path(record_path.parent))
    kept = postmortem.path_of(log_dir, namespace=namespace, sandbox_id=sandbox_id, suffix=".timeline")
    paths += sorted(log_dir.glob(kept.name))
    return [
        parse(path.read_text(encoding="utf-8", errors="replace"), title=sandbox_id)
        for path in paths
        if path.exists()
    ]


def _path(state: Path) -> Path:
    return state / timeline.NAME

"""Timelines on disk: beside the state of a running sandbox, and beside the record of an ended one."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

from shim.telemetry import postmortem, timeline
from shim.telemetry.timeline_model import Timeline, parse, trace
from shim.telemetry.timeline_svg import draw

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


class SandboxTimeline:
    """The timeline of a running sandbox.

    :param state: its state directory.
    :param log_dir: where it outlives the sandbox.
    :param namespace: containerd's namespace.
    :param sandbox_id: the sandbox's id.
    """

    def __init__(self, state: Path, *, log_dir: Path, namespace: str, sandbox_id: str) -> None:
        self._state = state
        self._log_dir = log_dir
        self._namespace = namespace
        self._sandbox_id = sandbox_id
        #: Whether it is also kept as a picture and as a trace.
        self.is_drawn = os.environ.get(timeline.ENVIRONMENT_VARIABLE) == "1"

    def write(self, *, kept: bool = False) -> None:
        """Write the timeline so far; a failure is logged.

        :param kept: also write it where it outlives the sandbox.
        """
        try:
            timeline.write(str(self._state))
            if kept:
                keep(
                    self._state,
                    log_dir=self._log_dir,
                    namespace=self._namespace,
                    sandbox_id=self._sandbox_id,
                    drawn=self.is_drawn,
                )
        except FileNotFoundError:  # `delete` was faster
            log.debug("timeline: sandbox %s: its state is gone", self._sandbox_id)
        except OSError as error:
            log.warning("timeline: sandbox %s: it is lost: %s", self._sandbox_id, error)


def keep(state: Path, *, log_dir: Path, namespace: str, sandbox_id: str, drawn: bool) -> None:
    """Keep the timeline of a sandbox beyond its end; the newest hundred are kept.

    :param state: its state directory.
    :param log_dir: where it is kept.
    :param namespace: containerd's namespace.
    :param sandbox_id: the sandbox's id.
    :param drawn: also keep it as a picture and as a trace.
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


def of_running(state: Path, *, title: str) -> Timeline:
    """Read the timeline of a sandbox that runs.

    :param state: its state directory.
    :param title: the sandbox's name.
    :raises OSError: if there is none yet.
    """
    return parse(_path(state).read_text(encoding="utf-8", errors="replace"), title=title)


def of_ended(log_dir: Path, *, namespace: str, sandbox_id: str) -> list[Timeline]:
    """Read the timelines that are kept of sandboxes with an id that have ended.

    :param log_dir: where timelines are kept.
    :param namespace: containerd's; ``*`` for any.
    :param sandbox_id: the id.
    """
    paths = postmortem.kept(log_dir, namespace=namespace, sandbox_id=sandbox_id, suffix=".timeline")
    return [parse(path.read_text(encoding="utf-8", errors="replace"), title=sandbox_id) for path in paths]


def _path(state: Path) -> Path:
    return state / timeline.NAME

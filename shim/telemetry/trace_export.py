"""Traces of a sandbox's starts: a process of its own sends them, so that no start waits for that.

The process outlives a sandbox that ends at once, by its own deadline at most. See ``spans.py``.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim.host import daemonize
from shim.telemetry import timeline
from shim.telemetry.trace_context import SANDBOX, TraceContexts

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

LOG = "tracing.log"
_START_TIMEOUT_S = 10.0
_MOST_LOG_BYTES = 1 << 20
_NICENESS = 10


class TraceExport:
    """Sends the phases of one sandbox's starts, each once.

    :param endpoint: where to, by OTLP over HTTP.
    :param state: the sandbox's state directory, which has its timeline.
    :param log_dir: where the process says why it could not.
    """

    def __init__(self, endpoint: str, *, state: Path, log_dir: Path) -> None:
        self.contexts = TraceContexts()
        self._endpoint = endpoint
        self._state = state
        self._log = log_dir / LOG
        self._read = 0
        self._waiting: list[list[Any]] = []
        self._has_sent = False

    async def send(self, container_id: str, attributes: Mapping[str, str]) -> None:
        """Send what a container's start has added to the timeline; a failure is logged.

        :param container_id: the container.
        :param attributes: of the spans.
        """
        try:
            batch = self._batch(container_id, attributes)
            if importlib.util.find_spec("opentelemetry") is None:
                log.warning(
                    "tracing: opentelemetry-sdk is not installed; install what the extra `tracing` names"
                )
                return
            await self._start(json.dumps(batch).encode())
        except (OSError, TimeoutError) as error:
            log.warning("tracing: nothing is sent of %s: %s", container_id, error)

    def _batch(self, container_id: str, attributes: Mapping[str, str]) -> dict[str, Any]:
        with Path(timeline.path_of(str(self._state))).open("rb") as file:
            file.seek(self._read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        # A container that still starts has its turn later.
        own, others = timeline.container_lane(container_id), timeline.container_lane("")
        phases = [*self._waiting, *map(json.loads, text.splitlines())]
        self._waiting = [phase for phase in phases if phase[0].startswith(others) and phase[0] != own]
        is_first, self._has_sent = not self._has_sent, True
        return {
            "endpoint": self._endpoint,
            "attributes": dict(attributes),
            "container": container_id,
            "lane": own,
            "carried": self.contexts.take(container_id),
            "sandbox_carried": self.contexts.take(SANDBOX) if is_first else None,
            "phases": [phase for phase in phases if phase not in self._waiting],
            "epoch_ns": time.time_ns() - time.monotonic_ns(),
        }

    async def _start(self, batch: bytes) -> None:
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > _MOST_LOG_BYTES:
            self._log.unlink()
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        given = os.memfd_create("trace", os.MFD_CLOEXEC)
        try:
            os.write(given, batch)
            os.lseek(given, 0, os.SEEK_SET)
            starter = await asyncio.create_subprocess_exec(
                *("setsid", "--fork", "nice", f"--adjustment={_NICENESS}"),
                *(sys.executable, "-P", "-m", "shim.telemetry.spans"),
                stdin=given,
                stdout=output,
                stderr=output,
                cwd="/",
                env=daemonize.environment(),
            )
        finally:
            os.close(given)
            os.close(output)
        async with asyncio.timeout(_START_TIMEOUT_S):
            await starter.wait()

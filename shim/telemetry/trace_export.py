"""Traces of a sandbox's starts, also of failed ones: a process of its own sends them, so no start waits.

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
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim.host import daemonize
from shim.telemetry import timeline
from shim.telemetry.trace_context import SANDBOX, TraceContexts

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

LOG = "tracing.log"
MISSING = "OpenTelemetry is not installed; install what the extra `tracing` names, or leave the endpoint out"
_START_TIMEOUT_S = 10.0
_MOST_LOG_BYTES = 1 << 20
_NICENESS = 10
MODULES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def is_available() -> bool:
    """Tell whether the libraries are installed that send traces."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in MODULES)
    except ModuleNotFoundError:  # a package above it is missing
        return False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something did not start.

    :param error: the reason.
    :param began_s: when the start was requested, in seconds of ``time.monotonic()``.
    :param ended_s: when it failed.
    """

    error: BaseException
    _: KW_ONLY
    began_s: float
    ended_s: float

    def described(self) -> dict[str, Any]:
        """Describe it in terms of JSON."""
        text = " ".join(str(self.error).split()) or "it was given up"
        interval = {"began_s": self.began_s, "ended_s": self.ended_s}
        return {"type": type(self.error).__name__, "text": text, **interval}


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

    async def send(
        self,
        container_id: str,
        attributes: Mapping[str, str],
        *,
        failure: Failure | None = None,
        sandbox_failure: Failure | None = None,
    ) -> None:
        """Send what a start has added to the timeline; if that is impossible, it is logged.

        :param container_id: the container that was to start; empty for the sandbox alone.
        :param attributes: of the spans.
        :param failure: why the container did not start.
        :param sandbox_failure: why the sandbox did not start.
        """
        what = f"container {container_id}" if container_id else "the sandbox"
        try:
            batch = self._batch(container_id, attributes)
            batch["failure"] = failure and failure.described()
            batch["sandbox_failure"] = sandbox_failure and sandbox_failure.described()
            if not is_available():
                log.warning("tracing: the start of %s is not sent: %s", what, MISSING)
                return
            await self._start(json.dumps(batch).encode())
        except (OSError, TimeoutError) as error:
            log.warning("tracing: the start of %s is not sent: %s", what, error)

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
            "carried": self.contexts.take(container_id) if container_id else {},
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

"""The traces of a sandbox's starts, for operators who want them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

from shim.errors import AlreadyExists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from shim.sandbox.work import Work
    from shim.telemetry.timeline_files import SandboxTimeline
    from shim.telemetry.trace_export import TraceExport


class Tracing:
    """Sends a trace of each start of a sandbox, whether it succeeds or not.

    :param traces: where they go; None if nowhere.
    :param timeline: the sandbox's, whose phases they consist of.
    :param work: runs the task that sends a trace after a failure.
    :param attributes: of their spans.
    :param sandbox_has_failed: tells whether the machine ended before it was up.
    """

    def __init__(
        self,
        traces: TraceExport | None,
        *,
        timeline: SandboxTimeline,
        work: Work,
        attributes: Mapping[str, str],
        sandbox_has_failed: Callable[[], bool],
    ) -> None:
        self._traces = traces
        self._timeline = timeline
        self._work = work
        self._attributes = attributes
        self._sandbox_has_failed = sandbox_has_failed

    async def send(self, container_id: str) -> None:
        """Send the trace of a container that has started.

        :param container_id: the container.
        """
        if self._traces is not None:
            await self._traces.send(container_id, self._attributes)

    @contextlib.contextmanager
    def failures(self, container_id: str = "") -> Iterator[None]:
        """Send the trace of a start that fails within the block; its error does not wait for that.

        :param container_id: the container that starts; empty for the sandbox alone.
        """
        began_s = time.monotonic()
        try:
            yield
        except AlreadyExists:  # the start of the other one has its own trace
            raise
        except (Exception, asyncio.CancelledError) as error:
            if self._traces is not None:
                self._send_failure(self._traces, container_id, error, began_s=began_s)
            raise

    def _send_failure(
        self, traces: TraceExport, container_id: str, error: BaseException, *, began_s: float
    ) -> None:
        from shim.telemetry.trace_export import Failure  # noqa: PLC0415 - few hosts send traces

        failed = partial(Failure, error, began_s=began_s, ended_s=time.monotonic())
        self._timeline.write()
        sending = traces.send(
            container_id,
            self._attributes,
            failure=failed() if container_id else None,
            sandbox_failure=failed() if self._sandbox_has_failed() or not container_id else None,
        )
        self._work.spawn(sending, name=f"trace of {container_id or 'the sandbox'}")

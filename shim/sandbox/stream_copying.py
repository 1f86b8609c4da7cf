"""Copies a process's streams between the guest's agent and the client's FIFOs.

Each output is read by one request after another, so a stalled reader stalls only its own stream, and the
guest's pipe makes the process wait.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from shim.errors import ShimError
from shim.sandbox.host_streams import HostStreams, Stdio, plain_path, read_chunk, write_all
from shim.telemetry import timeline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.agent.guest_streams import GuestStreams

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 10.0  # containerd's runc shim lets Delete wait this long for output to be read
GUEST_TIMEOUT_S = 60.0  # for a guest to hand over a process's output; on a busy host it may stall


class StreamCopier:
    """Copies the streams of one process.

    :param guest_streams: their guest ends.
    :param stdio: the stream paths.
    :param host_streams: their host ends, open.
    :param name: names the process in the log.
    :param heard: set once the client has the first byte of output.
    """

    def __init__(
        self,
        guest_streams: GuestStreams,
        *,
        stdio: Stdio,
        host_streams: HostStreams,
        name: str,
        heard: asyncio.Event,
    ) -> None:
        self._guest_streams = guest_streams
        self._stdio = stdio
        self._host_streams = host_streams
        self._name = name
        self._heard = heard
        self._moved_at_s: float | None = None
        self._unread = 0

    def outputs(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Start to copy each output until its end."""
        names = ["stdout"] if self._stdio.terminal else ["stdout", "stderr"]
        return [group.create_task(self._carry_output(name)) for name in names]

    async def carry_input(self, started: asyncio.Event) -> None:
        """Copy stdin until its end, then close the process's input.

        :param started: set when the process runs.
        """
        try:
            if self._stdio.stdin:
                await started.wait()
                self._host_streams.open_stdin(plain_path("stdin", self._stdio.stdin))
                while data := await read_chunk(self._host_streams.stdin):
                    await self._guest_streams.write(data)
            if not self._stdio.terminal:
                await self._guest_streams.end_input()
        except ShimError as error:
            log.debug("stdio: stdin of %s: ended: %s", self._name, error)
        except OSError as error:
            log.warning("stdio: stdin of %s: %s", self._name, error)

    def process_ended(self) -> None:
        """Give the reader the drain time from now on."""
        self._moved()

    async def drained(self, tasks: Iterable[asyncio.Task[None]]) -> bool:
        """Wait for tasks as long as output keeps being read, however slowly.

        :param tasks: the tasks that end when everything has been read.
        :returns: False if the client read nothing for the drain time, or the guest sent nothing for longer;
            the tasks continue.
        """
        pending = {task for task in tasks if not task.done()}
        now_s = asyncio.get_running_loop().time
        moved_at_s = self._moved_at_s or now_s()
        while pending and (left_s := moved_at_s + self._patience_s - now_s()) > 0:
            # During that time, it may start to wait for the guest instead of the client, or the reverse.
            _, pending = await asyncio.wait(pending, timeout=min(left_s, DRAIN_TIMEOUT_S))
            moved_at_s = self._moved_at_s or moved_at_s
        return not pending

    @property
    def _patience_s(self) -> float:
        return DRAIN_TIMEOUT_S if self._unread else GUEST_TIMEOUT_S

    def _moved(self) -> None:
        self._moved_at_s = asyncio.get_running_loop().time()

    async def _carry_output(self, name: str) -> None:
        """Copy one output until its end; without a stream the bytes are read and dropped."""
        try:
            while data := await self._guest_streams.read(name):
                self._moved()
                await self._write(name, data)
                if not self._heard.is_set():
                    timeline.mark(f"first byte of {name}", lane=timeline.container_lane(self._name))
                    self._heard.set()
        except ShimError as error:
            log.debug("stdio: %s of %s: ended: %s", name, self._name, error)
        finally:
            self._host_streams.close(name)

    async def _write(self, name: str, data: bytes | memoryview) -> None:
        descriptor = getattr(self._host_streams, name)
        if descriptor < 0:
            return
        self._unread += 1
        try:
            await write_all(descriptor, data, progressed=self._moved)
        except OSError as error:
            # Such as a full disk below a file:// log; the process must not wait forever.
            log.warning("stdio: %s of %s: %s; dropping what follows", name, self._name, error)
            self._host_streams.close(name)
        finally:
            self._unread -= 1

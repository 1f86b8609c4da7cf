"""The container that stands for a pod: it runs nothing, because the machine is what holds the pod together.

To containerd it is a task like any other. What it would run, Kubernetes' pause program, does nothing but
wait and end with status 0 on SIGTERM and SIGINT, and so does this.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from shim.errors import NotFound, Unimplemented
from shim.sandbox.container import STATUS_MACHINE_GONE, Container
from shim.sandbox.host_streams import open_streams
from shim.sandbox.process import State

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from proto.containerd.types_pb2 import Mount
    from proto.kata import agent_pb2
    from shim.sandbox.host_streams import Stdio
    from shim.sandbox.process import Process

# Whatever else it is sent, the first process of a PID namespace ignores what it has no handler for.
_DEADLY = {signal.SIGTERM: 0, signal.SIGINT: 0, signal.SIGKILL: 128 + signal.SIGKILL}


class PauseContainer(Container):
    """A container without a process, which ends when it is told to or with the machine."""

    _watching: asyncio.Task[None] | None = None

    async def _bring_up(self, rootfs: Iterable[Mount]) -> None:  # noqa: ARG002 - nobody looks into it
        # A pod that is there has a machine that is up: otherwise its creation fails, and says why.
        await self._sandbox.agent()
        self.init.streams = await open_streams(
            self.init.stdio, container_id=self.id, namespace=self._sandbox.namespace
        )
        try:
            await self._hooks.created(pid=self._sandbox.pid)
        except BaseException:
            self.init.close_streams()
            raise
        self._watching = self._sandbox.work.spawn(self._end_with_machine(), name=f"watch {self.init}")

    async def _run(self) -> None:
        await self._sandbox.agent()

    async def _freeze(self) -> None:
        return

    async def _thaw(self) -> None:
        return

    async def update(self, resources: dict[str, Any]) -> None:
        """Take note of nothing: limits are the containers' own."""

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Measure all containers of the pod.

        :raises NotFound: if it has ended.
        """
        if self.init.exited.is_set():
            raise NotFound(f"stats: container {self.id}: not running")
        return await self._sandbox.stats()

    async def exec_ids_of_processes(self) -> list[str]:
        """List no process but the one that it pretends to have.

        :raises NotFound: if it has ended.
        """
        if self.init.exited.is_set():
            raise NotFound(f"pids: container {self.id}: not running")
        return []

    def add_exec(self, exec_id: str, *, spec: dict[str, Any], stdio: Stdio) -> None:  # noqa: ARG002 - as of every container
        """Refuse: there is nothing to run in.

        :raises Unimplemented: always.
        """
        raise Unimplemented(
            f"exec {exec_id} of {self.id}: it stands for its pod and runs nothing; use a container of the pod"
        )

    async def resize(self, process: Process, width: int, height: int) -> None:
        """Ignore the size of a terminal that nobody writes to."""

    async def kill(self, process: Process, *, number: int, everyone: bool) -> None:  # noqa: ARG002 - it is alone
        """Send a signal.

        :raises NotFound: if it has ended.
        """
        if process.exited.is_set():
            raise NotFound(f"kill: {process}: process already finished: not found")
        if number in _DEADLY:
            await self._end(_DEADLY[signal.Signals(number)])

    async def _remove_from_guest(self) -> None:
        if self.init.state is State.CREATED:
            await self._end(STATUS_MACHINE_GONE)

    async def _end_with_machine(self) -> None:
        await self._sandbox.ended.wait()
        await self._end(STATUS_MACHINE_GONE)

    async def _end(self, status: int) -> None:
        async with self.lock:
            self._report_exit(self.init, status)
        self.init.close_streams()
        if self._watching is not None:
            self._watching.cancel()

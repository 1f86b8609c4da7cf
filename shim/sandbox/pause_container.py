"""The container that stands for a pod: it runs no program, because the machine holds the pod together.

To containerd, it is a task like any other. Kubernetes' pause program only waits, and ends with status 0 on
SIGTERM and SIGINT. This container does the same.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from shim.errors import NotFound, Unimplemented
from shim.host.host_process import STATUS_KILLED
from shim.override import override
from shim.sandbox.container import Container
from shim.sandbox.host_streams import open_host_streams
from shim.sandbox.process import State

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from proto.containerd.types_pb2 import Mount
    from proto.kata import agent_pb2
    from shim.sandbox.host_streams import Stdio
    from shim.sandbox.process import Process

# The first process of a PID namespace ignores all other signals without a handler.
_DEADLY = {signal.SIGTERM: 0, signal.SIGINT: 0, signal.SIGKILL: STATUS_KILLED}


class PauseContainer(Container):
    """A container without a process; a signal or the end of the machine ends it."""

    _watching: asyncio.Task[None] | None = None

    @override
    async def update(self, resources: dict[str, Any]) -> None:
        """Ignore limits: each container of the pod has its own."""

    @override
    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Measure all containers of the pod.

        :raises NotFound: if it has ended.
        """
        self._require_alive_for("stats")
        return await self._siblings.stats()

    @override
    async def exec_ids_of_processes(self) -> list[str]:
        """List only the init that it pretends to have.

        :raises NotFound: if it has ended.
        """
        self._require_alive_for("pids")
        return []

    @override
    def add_exec(self, exec_id: str, *, spec: dict[str, Any], stdio: Stdio) -> None:  # noqa: ARG002 - every container has it
        """Refuse, because there is no container to run in.

        :raises Unimplemented: always.
        """
        raise Unimplemented(
            f"exec {exec_id} of {self.id}: it stands for its pod and runs nothing; use a container of the pod"
        )

    @override
    async def start_exec(self, exec_id: str) -> None:
        """Refuse: it has no exec.

        :raises NotFound: always.
        """
        raise NotFound(f"exec {exec_id} of {self.id}: not found")

    @override
    async def resize(self, process: Process, width: int, height: int) -> None:
        """Ignore the size of a terminal that is never written to."""

    @override
    async def kill(self, process: Process, *, number: int, everyone: bool) -> None:  # noqa: ARG002 - it has only one process
        """Send a signal.

        :raises NotFound: if it has ended.
        """
        if process.exited.is_set():
            raise NotFound(f"kill: {process}: process already finished: not found")
        if number in _DEADLY:
            await self._end(_DEADLY[signal.Signals(number)])

    @override
    async def _bring_up(self, rootfs: Iterable[Mount]) -> None:  # noqa: ARG002 - its files are not used
        # A pod exists only if its machine runs; otherwise its creation fails with the reason.
        await self._sandbox.agent()
        self.init.host_streams = await open_host_streams(
            self.init.stdio, container_id=self.id, namespace=self._sandbox.namespace
        )
        try:
            await self._hooks.created(pid=self._sandbox.pid)
        except BaseException:
            self.init.close_streams()
            raise
        self._watching = self._sandbox.work.spawn(self._end_with_machine(), name=f"watch {self.init}")

    @override
    async def _run(self) -> None:
        await self._sandbox.agent()

    @override
    async def _freeze(self) -> None:
        return

    @override
    async def _thaw(self) -> None:
        return

    @override
    async def _remove(self) -> None:
        if self.init.state is State.CREATED:
            await self._end(STATUS_KILLED)

    @override
    async def _take_back(self) -> None:
        return

    async def _end_with_machine(self) -> None:
        await self._end(await self._machine_ended(self.init))

    async def _end(self, status: int) -> None:
        async with self.lock:
            self._report_exit(self.init, status)
        self.init.close_streams()
        if self._watching is not None:
            self._watching.cancel()

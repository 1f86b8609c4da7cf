"""Calls to the guest's agent about containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from proto.extensions import PROCESSES, UNIFIED
from proto.kata import agent_pb2, oci_pb2
from shim.agent.connection import CALL_TIMEOUT_S
from shim.errors import InvalidArgument, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.agent.connection import AgentConnection
    from shim.agent.process_calls import ProcessCalls

STATS_TIMEOUT_S = 1.8  # containerd asks for statistics with a limit of 2 s
REMOVE_TIMEOUT_S = 7.0  # containerd's CRI allows 10 s for the end of a task, including all of Delete

_MOST_STATS_BYTES = 256 << 10  # ten times the size with all possible devices
_MOST_PROCESSES = 32_768  # the kernel's own limit, unless it has been raised
_MOST_MEMORY = (1 << 63) - 4096  # the value that a cgroup without a limit shows
_MANY_PROCESSORS = 1000
_DEFAULT_PERIOD_US = 100_000  # the kernel's


class ContainerCalls:
    """Calls about the containers of one sandbox. All ids are the agent's.

    :param connection: to the agent.
    :param processes: calls about processes; the init of a container is one.
    """

    def __init__(self, connection: AgentConnection, processes: ProcessCalls) -> None:
        self._connection = connection
        self._processes = processes

    async def create(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Create a container up to the point where its init waits to be started."""
        if not self._connection.features.is_hako:
            _leave_out_empty_limits(request.OCI.Linux.Resources)
        await self._connection.call("CreateContainer", request, Empty)
        await self._processes.size_terminal(request, request.OCI.Process)

    async def start(self, container_id: str) -> None:
        """Let the init of a created container run."""
        await self._connection.call(
            "StartContainer", agent_pb2.StartContainerRequest(container_id=container_id), Empty
        )

    async def remove(self, container_id: str, *, timeout_s: float) -> None:
        """Kill the remaining processes of a container, write its disks and forget it.

        :param timeout_s: how long that may take.
        """
        request = agent_pb2.RemoveContainerRequest(container_id=container_id)
        await self._connection.call("RemoveContainer", request, Empty, timeout_s=timeout_s)

    async def pause(self, container_id: str) -> None:
        """Freeze every process of a container."""
        await self._connection.call(
            "PauseContainer", agent_pb2.PauseContainerRequest(container_id=container_id), Empty
        )

    async def resume(self, container_id: str) -> None:
        """Let the processes of a frozen container continue."""
        await self._connection.call(
            "ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container_id), Empty
        )

    async def update(
        self,
        container_id: str,
        resources: oci_pb2.LinuxResources,
        *,
        unified: Mapping[str, str] | None = None,
    ) -> None:
        """Change a container's limits inside the guest.

        :param unified: limits by the name of their cgroup file; only Hako's agent can change these.
        :raises InvalidArgument: if ``unified`` is given and the agent is not Hako's.
        """
        if unified and not self._connection.features.is_hako:
            names = ", ".join(unified)
            raise InvalidArgument(
                f"resources: unified: {names}: the guest's agent cannot change it; leave it out"
            )
        request = agent_pb2.UpdateContainerRequest(container_id=container_id, resources=resources)
        if not self._connection.features.is_hako:
            _lift(request.resources)
            _leave_out_empty_limits(request.resources)
        await self._connection.call("UpdateContainer", request, Empty)
        if unified:
            lines = "\n".join(f"{name}={value}" for name, value in unified.items())
            await self._connection.diagnose(
                f"{UNIFIED} {lines}", container_id=container_id, timeout_s=CALL_TIMEOUT_S
            )

    async def stats(
        self, container_id: str, *, timeout_s: float = STATS_TIMEOUT_S
    ) -> agent_pb2.StatsContainerResponse:
        """Return a container's statistics.

        :param timeout_s: how long the agent may take.
        :raises DeadlineExceeded: if it does not answer in time.
        """
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        return await self._connection.call(
            "StatsContainer",
            request,
            agent_pb2.StatsContainerResponse,
            timeout_s=timeout_s,
            most_bytes=_MOST_STATS_BYTES,
        )

    async def exec_ids(self, container_id: str) -> list[str]:
        """List the exec ids of a container's processes; init and child processes have an empty one.

        Kata's protocol has no call for this; Hako's agent answers it as diagnostic data.

        :raises ShimError: of any kind, if the agent does not answer it.
        """
        text = await self._connection.diagnose(PROCESSES, container_id=container_id)
        lines = text.split("\n", _MOST_PROCESSES)
        if len(lines) > _MOST_PROCESSES:
            raise ResourceExhausted(f"pids: container {container_id}: over {_MOST_PROCESSES} processes")
        return [line.partition(" ")[2] for line in lines if line]


def _lift(resources: oci_pb2.LinuxResources) -> None:
    """Express "no limit" for a stock agent, which ignores numbers below one."""
    memory, cpu = resources.Memory, resources.CPU
    for name in ("Limit", "Swap"):
        if getattr(memory, name) < 0:
            setattr(memory, name, _MOST_MEMORY)
    if cpu.Quota < 0:
        cpu.Quota = _MANY_PROCESSORS * (cpu.Period or _DEFAULT_PERIOD_US)


def _leave_out_empty_limits(resources: oci_pb2.LinuxResources) -> None:
    """Leave out limits of 0: a stock agent fails if the guest has no huge pages of that size."""
    limits = [limit for limit in resources.HugepageLimits if limit.Limit]
    del resources.HugepageLimits[:]
    resources.HugepageLimits.extend(limits)

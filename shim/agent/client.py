"""Typed client of the guest's agent, with the calls about the guest as a whole.

Calls about containers, processes and files are in other modules, over the same connection.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from proto.extensions import (
    CLOCK,
    CLOCK_FEATURE,
    DROP_CACHES,
    FEATURE,
    LIMITS,
    SHARE_FILES,
    SHARE_TAG,
    SHELL_FEATURE,
    STREAMS_FEATURE,
    TIMELINE,
)
from proto.kata import agent_pb2, types_pb2
from shim.agent.connection import CALL_TIMEOUT_S, AgentConnection, AgentFeatures
from shim.agent.container_calls import ContainerCalls
from shim.agent.file_calls import FileCalls
from shim.agent.guest_paths import SHARE_DIRECTORY, SHM_BYTES, SHM_DIRECTORY, WATCHABLE_DIRECTORY
from shim.agent.process_calls import ProcessCalls
from shim.transport.ttrpc_client import TtrpcClient

if TYPE_CHECKING:
    import socket

    from shim.agent.gate import Gate

SEED_BYTES = 64  # the guest's kernel mixes as many at once
_FIRST_CLOCK_ERROR_NS = 250_000_000  # no program that reads the time runs yet
_CLOCK_ERROR_NS = 2_000_000
_MAX_SETTINGS = 5


class Agent:
    """The agent of one sandbox.

    :param client: a ttrpc client over a connection to the guest's agent port.
    """

    def __init__(self, client: TtrpcClient) -> None:
        self._connection = AgentConnection(client)
        self.processes = ProcessCalls(self._connection)
        self.containers = ContainerCalls(self._connection, self.processes)
        self.files = FileCalls(self._connection)

    @property
    def gate(self) -> Gate:
        """The gate that each call passes on its way to the agent."""
        return self._connection.gate

    @property
    def is_hako(self) -> bool:
        """Whether the agent is Hako's, which also keeps a process's streams after its end."""
        return self._connection.features.is_hako

    @property
    def supports_seccomp(self) -> bool:
        """Whether the agent applies seccomp profiles."""
        return self._connection.features.supports_seccomp

    @property
    def frames_streams(self) -> bool:
        """Whether the agent carries a stream in frames over its own connection."""
        return self._connection.features.frames_streams

    @property
    def tells_time(self) -> bool:
        """Whether the agent can report the guest's time."""
        return self._connection.features.tells_time

    @classmethod
    async def over(cls, connection: socket.socket, *, timeout_s: float, is_clone: bool = False) -> Agent:
        """Connect to the agent behind ``connection`` and wait for its first answer.

        :param timeout_s: how long the first answer may take.
        :param is_clone: whether other machines have started with the same memory; if so, the guest first gets
            a fresh random seed and the time.
        :raises DeadlineExceeded: if the agent does not answer in time.
        :raises Unavailable: if the connection breaks.
        """
        agent = cls(await TtrpcClient.over(connection))
        try:
            await (agent.become_unique(timeout_s=timeout_s) if is_clone else agent.check(timeout_s=timeout_s))
        except BaseException:
            await agent.aclose()
            raise
        return agent

    async def check(self, *, timeout_s: float) -> None:
        """Wait for an answer of the agent; see :meth:`shim.agent.connection.AgentConnection.check`."""
        await self._connection.check(timeout_s=timeout_s)

    async def aclose(self) -> None:
        """Close the connection; pending calls fail with Unavailable."""
        await self._connection.aclose()

    async def wait_closed(self) -> None:
        """Block until the connection is lost or closed."""
        await self._connection.wait_closed()

    async def become_unique(self, *, timeout_s: float) -> None:
        """Give the guest its own random seed and the host's time, both at once.

        :raises DeadlineExceeded: if it does not answer in time.
        :raises ShimError: if it cannot, or the connection breaks.
        """
        seed = agent_pb2.ReseedRandomDevRequest(data=os.urandom(SEED_BYTES))
        await asyncio.gather(
            self._connection.call("ReseedRandomDev", seed, Empty, timeout_s=timeout_s),
            self.set_time(timeout_s=timeout_s, error_ns=_FIRST_CLOCK_ERROR_NS),
        )

    async def set_time(self, *, timeout_s: float = CALL_TIMEOUT_S, error_ns: int = _CLOCK_ERROR_NS) -> None:
        """Set the guest's clock, and set it again if the message took longer or shorter than assumed.

        :param error_ns: how wrong it may be, in nanoseconds.
        """
        way_ns = 0
        for _ in range(_MAX_SETTINGS):
            sent_at_ns = time.time_ns()
            seconds, nanoseconds = divmod(sent_at_ns + way_ns, 10**9)
            request = agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=nanoseconds // 1000)
            await self._connection.call("SetGuestDateTime", request, Empty, timeout_s=timeout_s)
            took_ns = time.time_ns() - sent_at_ns
            if abs(took_ns // 2 - way_ns) < error_ns:
                return
            way_ns = took_ns // 2

    async def ask_time(self) -> str:
        """Ask for the guest's time, see :func:`shim.machine.clock.reading`; only if it :attr:`tells_time`."""
        return await self._connection.diagnose(CLOCK)

    async def move_time(self, shift_ns: int) -> None:
        """Move the guest's clock; only if it :attr:`tells_time`."""
        await self._connection.diagnose(f"{CLOCK} {shift_ns:+d}")

    async def create_sandbox(
        self, *, sandbox_id: str, hostname: str, dns: list[str], shm_bytes: int = SHM_BYTES
    ) -> None:
        """Prepare the guest: mount the share, make the shared namespaces. Exactly once per machine.

        :param dns: lines of resolv.conf.
        :param shm_bytes: the size of the shared memory that containers have at ``/dev/shm``.
        """
        storages = [
            agent_pb2.Storage(
                driver="virtio-fs", source=SHARE_TAG, fstype="virtiofs", mount_point=f"{SHARE_DIRECTORY}/"
            ),
            _shm(shm_bytes),
            # The share is read-only, but copies that the guest keeps up to date are mounted on a part of it.
            agent_pb2.Storage(
                driver="ephemeral",
                source="tmpfs",
                fstype="tmpfs",
                mount_point=WATCHABLE_DIRECTORY,
                options=["nosuid", "nodev", "mode=0755"],
            ),
        ]
        # A stock agent reports no kills in a container that has the sandbox's own id.
        request = agent_pb2.CreateSandboxRequest(
            sandbox_id=f"{sandbox_id}-sandbox", hostname=hostname, dns=dns, storages=storages
        )
        _, answer = await asyncio.gather(
            self._connection.call("CreateSandbox", request, Empty),
            self._connection.call(
                "GetGuestDetails", agent_pb2.GuestDetailsRequest(), agent_pb2.GuestDetailsResponse
            ),
        )
        details = answer.agent_details
        self._connection.features = AgentFeatures(
            is_hako=FEATURE in details.extra_features,
            supports_seccomp=details.supports_seccomp,
            frames_streams=STREAMS_FEATURE in details.extra_features,
            tells_time=CLOCK_FEATURE in details.extra_features,
            runs_shells=SHELL_FEATURE in details.extra_features,
        )
        if not self.is_hako:
            # A stock agent applies the options of such a storage only to a remount.
            again = agent_pb2.UpdateEphemeralMountsRequest(storages=[_shm(shm_bytes, "remount")])
            await self._connection.call("UpdateEphemeralMounts", again, Empty)

    async def update_interface(self, interface: types_pb2.Interface) -> None:
        """Set up a network card; wait for it if it is being plugged."""
        await self._connection.call(
            "UpdateInterface", agent_pb2.UpdateInterfaceRequest(interface=interface), types_pb2.Interface
        )

    async def update_routes(self, request: agent_pb2.UpdateRoutesRequest) -> list[str]:
        """Set the routes, in their order; a stock agent keeps earlier ones.

        :returns: the rules and parameters that the guest cannot apply, with reasons.
        """
        answer = await self._connection.call("UpdateRoutes", request, agent_pb2.Routes)
        return list(answer.refused)

    async def add_arp_neighbors(self, neighbors: agent_pb2.ARPNeighbors) -> None:
        """Set the hardware addresses of neighbours; a stock agent keeps earlier ones."""
        request = agent_pb2.AddARPNeighborsRequest(neighbors=neighbors, complete=True)
        await self._connection.call("AddARPNeighbors", request, Empty)

    async def use_cpus(self, count: int) -> None:
        """Let the guest use this many processors, and wait until it does."""
        request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=count, cpu_only=True)
        await self._connection.call("OnlineCPUMem", request, Empty)

    async def online_memory(self) -> None:
        """Prepare the guest for memory that is about to be added, or let it use added memory.

        Hako's agent also adapts the kernel's limits to the memory.
        """
        await self._connection.call("OnlineCPUMem", agent_pb2.OnlineCPUMemRequest(wait=True), Empty)

    async def follow_limits(self) -> None:
        """Adjust the kernel's limits to the memory that is left; only Hako's agent can."""
        await self._connection.diagnose(LIMITS)

    async def keep_share_files_below(self, limit: int) -> None:
        """Let the guest remember fewer files of the share than its server may open; only Hako's agent can.

        :param limit: how many the server may open.
        """
        # Nothing depends on the answer, and a busy guest may be slow.
        await self._connection.diagnose(f"{SHARE_FILES} {limit}", timeout_s=CALL_TIMEOUT_S)

    async def drop_caches(self) -> None:
        """Have the guest's kernel free the memory that it can do without; only Hako's agent can."""
        await self._connection.diagnose(DROP_CACHES, timeout_s=CALL_TIMEOUT_S)

    async def timeline(self) -> str:
        """Ask for the agent's phases and their times.

        Kata's protocol has no call for this; Hako's agent answers it as diagnostic data.

        :raises ShimError: of any kind, if the agent does not report them.
        """
        return await self._connection.diagnose(TIMELINE)

    async def metrics(self) -> str:
        """Ask for the guest's and the agent's own numbers, in Prometheus' text format.

        :raises Unimplemented: if the agent counts nothing.
        """
        request = agent_pb2.GetMetricsRequest()
        return (await self._connection.call("GetMetrics", request, agent_pb2.Metrics)).metrics

    async def next_oom(self) -> str:
        """Block until the guest kernel kills a process for memory.

        :returns: the container it was in.
        """
        reply = await self._connection.call(
            "GetOOMEvent", agent_pb2.GetOOMEventRequest(), agent_pb2.OOMEvent, timeout_s=None
        )
        return reply.container_id


def _shm(size_bytes: int, *options: str) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        mount_point=SHM_DIRECTORY,
        options=[*options, "noexec", "nosuid", "nodev", "mode=1777", f"size={size_bytes}"],
    )

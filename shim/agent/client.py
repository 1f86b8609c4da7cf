"""Typed client of the guest agent: Kata's agent protocol over one multiplexed ttrpc connection.

Every call has a deadline, except the two that wait for the guest's own events: WaitProcess and the
reads of output. The long ones share the connection with everything else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.empty_pb2 import Empty

from proto.kata import agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2
from shim.agent.guest_paths import SHARE_DIRECTORY, SHARE_TAG, SHM_BYTES, SHM_DIRECTORY, WATCHABLE_DIRECTORY
from shim.agent.stock_errors import plain
from shim.errors import DeadlineExceeded, InvalidArgument, ShimError, Unavailable
from shim.transport.ttrpc_client import TtrpcClient

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping

    from google.protobuf.message import Message

log = logging.getLogger(__name__)

SERVICE = "grpc.AgentService"
HEALTH_SERVICE = "grpc.Health"

COPIED_BYTES = 1 << 20  # by each message; the protocol's own are below 4 MiB
SEED_BYTES = 64  # as many as the guest's kernel mixes at once
_FIRST_CLOCK_ERROR_NS = 250_000_000  # before anything runs that asks for the time
_CLOCK_ERROR_NS = 2_000_000
_MAX_SETTINGS = 5

CALL_TIMEOUT_S = 60.0  # the protocol's customary limit, Kata's create_container_timeout among them
PROCESSES_TIMEOUT_S = 1.0  # containerd asks for pids within the 5 s that a restart gives a shim
STATS_TIMEOUT_S = 1.8  # containerd asks for statistics with a limit of 2 s
REMOVE_TIMEOUT_S = 7.0  # containerd's CRI lets the end of a task, all of Delete included, take 10 s
VOLUMES_TIMEOUT_S = 2.0  # part of a Delete, too
SIGNAL_TIMEOUT_S = 10.0  # a kill must fail, or reach for the machine, before a client gives up


def _lift(resources: oci_pb2.LinuxResources) -> None:
    """Say "no limit" to an agent to which every number below one says nothing."""
    memory, cpu = resources.Memory, resources.CPU
    for name in ("Limit", "Swap"):
        if getattr(memory, name) < 0:
            setattr(memory, name, _MOST_MEMORY)
    if cpu.Quota < 0:
        cpu.Quota = _MANY_PROCESSORS * (cpu.Period or _DEFAULT_PERIOD_US)


def _leave_out_empty_limits(resources: oci_pb2.LinuxResources) -> None:
    """Forbid nothing that a guest may not have: a stock agent would fail."""
    limits = [limit for limit in resources.HugepageLimits if limit.Limit]
    del resources.HugepageLimits[:]
    resources.HugepageLimits.extend(limits)


def _shm(size_bytes: int, *options: str) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        mount_point=SHM_DIRECTORY,
        options=[*options, "noexec", "nosuid", "nodev", "mode=1777", f"size={size_bytes}"],
    )


_MOST_MEMORY = (1 << 63) - 4096  # what a cgroup without a limit shows
_MANY_PROCESSORS = 1000
_DEFAULT_PERIOD_US = 100_000  # the kernel's
_MAX_STATUS = 255  # wait(2); containerd's own value for an exit that nobody can tell, too

_Reply = TypeVar("_Reply", bound="Message")


class Agent:
    """The agent of one sandbox.

    :param client: a ttrpc client over a connection to the guest's agent port.
    """

    def __init__(self, client: TtrpcClient) -> None:
        self._client = client
        self.is_hako = False
        self.keeps_streams = False
        self.supports_seccomp = False
        self.frames_streams = False
        self.tells_time = False

    @classmethod
    async def over(cls, connection: socket.socket, *, timeout_s: float, is_clone: bool = False) -> Agent:
        """Speak to the agent behind ``connection`` and have it answer.

        :param timeout_s: how long the first answer may take.
        :param is_clone: whether others have started with the same memory; its guest gets a randomness and the
            time of its own first.
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
        """Have the agent answer.

        :raises DeadlineExceeded: if it does not in time.
        :raises Unavailable: if the connection breaks.
        """
        await self._client.call(
            HEALTH_SERVICE,
            "Check",
            health_pb2.CheckRequest(),
            health_pb2.HealthCheckResponse,
            timeout_s=timeout_s,
        )

    async def become_unique(self, *, timeout_s: float) -> None:
        """Give the guest a randomness of its own and the host's time, both at once.

        :raises DeadlineExceeded: if it does not answer in time.
        :raises ShimError: if it cannot, or the connection breaks.
        """
        seed = agent_pb2.ReseedRandomDevRequest(data=os.urandom(SEED_BYTES))
        await asyncio.gather(
            self._call("ReseedRandomDev", seed, Empty, timeout_s=timeout_s),
            self.set_time(timeout_s=timeout_s, error_ns=_FIRST_CLOCK_ERROR_NS),
        )

    async def set_time(self, *, timeout_s: float = CALL_TIMEOUT_S, error_ns: int = _CLOCK_ERROR_NS) -> None:
        """Set the guest's clock; again if the message took longer, or less long, than was thought.

        :param error_ns: how wrong it may be.
        """
        way_ns = 0
        for _ in range(_MAX_SETTINGS):
            sent_at_ns = time.time_ns()
            seconds, nanoseconds = divmod(sent_at_ns + way_ns, 10**9)
            request = agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=nanoseconds // 1000)
            await self._call("SetGuestDateTime", request, Empty, timeout_s=timeout_s)
            took_ns = time.time_ns() - sent_at_ns
            if abs(took_ns // 2 - way_ns) < error_ns:
                return
            way_ns = took_ns // 2

    async def ask_time(self) -> str:
        """Ask for the guest's time, see :func:`shim.machine.clock.reading`; only if it :attr:`tells_time`."""
        return await self._diagnose("hako.clock")

    async def move_time(self, shift_ns: int) -> None:
        """Move the guest's clock; only if it :attr:`tells_time`."""
        await self._diagnose(f"hako.clock {shift_ns:+d}")

    async def _call(
        self,
        method: str,
        request: Message,
        reply: type[_Reply],
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
    ) -> _Reply:
        try:
            return await self._client.call(SERVICE, method, request, reply, timeout_s=timeout_s)
        except ShimError as error:
            meant = plain(error)
            if meant is error:
                raise
            raise meant from error

    async def aclose(self) -> None:
        """Close the connection; pending calls fail with Unavailable."""
        await self._client.aclose()

    async def wait_closed(self) -> None:
        """Block until the connection is lost or closed."""
        await self._client.wait_closed()

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
            # The share is read-only: what the guest keeps up to date by itself is mounted on a part of it.
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
            self._call("CreateSandbox", request, Empty),
            self._call("GetGuestDetails", agent_pb2.GuestDetailsRequest(), agent_pb2.GuestDetailsResponse),
        )
        details = answer.agent_details
        self.supports_seccomp = details.supports_seccomp
        self.frames_streams = "hako.streams" in details.extra_features
        self.tells_time = "hako.clock" in details.extra_features
        # A stock agent forgets a process' streams with the first WaitProcess answer; Hako's does not.
        self.is_hako = self.keeps_streams = "hako" in details.extra_features
        if not self.is_hako:
            # A stock agent takes the options of such a storage only when it is mounted again.
            again = agent_pb2.UpdateEphemeralMountsRequest(storages=[_shm(shm_bytes, "remount")])
            await self._call("UpdateEphemeralMounts", again, Empty)

    async def mount_tmpfs(self, mount_point: str, *, options: list[str]) -> None:
        """Mount a tmpfs that lives as long as the machine.

        :param options: of mount(8), one each. A stock agent takes those of a storage only by this call.
        """
        storage = agent_pb2.Storage(
            driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=mount_point, options=options
        )
        await self._call(
            "UpdateEphemeralMounts", agent_pb2.UpdateEphemeralMountsRequest(storages=[storage]), Empty
        )

    async def has_file(self, path: str) -> bool:
        """Tell whether there is a file or directory in the guest."""
        request = agent_pb2.VolumeStatsRequest(volume_guest_path=path)
        try:
            await self._call("GetVolumeStats", request, csi_pb2.VolumeStatsResponse)
        except (DeadlineExceeded, Unavailable):
            raise
        except ShimError:  # the status of an error is not the same with each agent
            return False
        return True

    async def copy_file(self, target: str, *, status: os.stat_result, data: bytes) -> None:
        """Make a file, a symbolic link or a directory.

        :param target: its path in the guest.
        :param status: its type, mode and owners.
        :param data: what is in the file, or where the link leads.
        """
        for offset in range(0, max(len(data), 1), COPIED_BYTES):
            request = agent_pb2.CopyFileRequest(
                path=target,
                file_size=len(data),
                file_mode=status.st_mode,
                dir_mode=0o755,
                uid=status.st_uid,
                gid=status.st_gid,
                offset=offset,
                data=data[offset : offset + COPIED_BYTES],
            )
            await self._call("CopyFile", request, Empty)

    async def change_volumes(self, storages: Iterable[agent_pb2.Storage]) -> None:
        """Mount volumes that belong to no container, or unmount those that have no source.

        Only Hako's agent can: to a stock one, the request is about the size of memory.
        """
        request = agent_pb2.UpdateEphemeralMountsRequest(storages=storages)
        await self._call("UpdateEphemeralMounts", request, Empty, timeout_s=VOLUMES_TIMEOUT_S)

    async def update_interface(self, interface: types_pb2.Interface) -> None:
        """Set a network card up as described; one that is being plugged is waited for."""
        await self._call(
            "UpdateInterface", agent_pb2.UpdateInterfaceRequest(interface=interface), types_pb2.Interface
        )

    async def update_routes(self, request: agent_pb2.UpdateRoutesRequest) -> list[str]:
        """Add routes, in their order; a stock agent keeps those that it was told of before.

        :returns: which of the rules and parameters in it the guest cannot have, and why.
        """
        answer = await self._call("UpdateRoutes", request, agent_pb2.Routes)
        return list(answer.refused)

    async def add_arp_neighbors(self, neighbors: agent_pb2.ARPNeighbors) -> None:
        """Fix the hardware addresses of neighbours; a stock agent keeps those that it was told of before."""
        request = agent_pb2.AddARPNeighborsRequest(neighbors=neighbors, complete=True)
        await self._call("AddARPNeighbors", request, Empty)

    async def use_cpus(self, count: int) -> None:
        """Let the guest use so many processors, and wait until it does."""
        request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=count, cpu_only=True)
        await self._call("OnlineCPUMem", request, Empty)

    async def online_memory(self) -> None:
        """Make the guest ready for memory that is about to be added, or have it use what was added.

        Hako's agent gives the kernel the limits that suit the memory there is, too.
        """
        await self._call("OnlineCPUMem", agent_pb2.OnlineCPUMemRequest(wait=True), Empty)

    async def follow_limits(self) -> None:
        """Have the kernel's limits suit the memory that is left; only Hako's agent can."""
        await self._diagnose("hako.limits")

    async def create_container(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Create a container up to the point where its init waits to be started."""
        if not self.is_hako:
            _leave_out_empty_limits(request.OCI.Linux.Resources)
        await self._call("CreateContainer", request, Empty)
        await self._size_terminal(request, request.OCI.Process)

    async def start_container(self, container_id: str) -> None:
        """Let the init of a created container run."""
        await self._call("StartContainer", agent_pb2.StartContainerRequest(container_id=container_id), Empty)

    async def remove_container(self, container_id: str, *, timeout_s: float) -> None:
        """Kill what is left of a container, write its disks and forget it.

        :param timeout_s: how long that may take.
        """
        request = agent_pb2.RemoveContainerRequest(container_id=container_id)
        await self._call("RemoveContainer", request, Empty, timeout_s=timeout_s)

    async def exec_process(self, request: agent_pb2.ExecProcessRequest) -> None:
        """Create and start a further process in a container."""
        await self._call("ExecProcess", request, Empty)
        await self._size_terminal(request, request.process)

    async def _size_terminal(
        self, made: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest, process: oci_pb2.Process
    ) -> None:
        """Have a new terminal as large as its process asks for; a stock agent does not read that there."""
        size = process.ConsoleSize
        if self.is_hako or not (process.Terminal and size.Height and size.Width):
            return
        try:
            await self.resize_terminal(
                made.container_id, exec_id=made.exec_id, rows=size.Height, columns=size.Width
            )
        except ShimError as error:  # the process is there, and may have ended already
            log.warning("terminal: %s of %s: its size stays: %s", made.exec_id, made.container_id, error)

    async def pause_container(self, container_id: str) -> None:
        """Freeze every process of a container."""
        await self._call("PauseContainer", agent_pb2.PauseContainerRequest(container_id=container_id), Empty)

    async def resume_container(self, container_id: str) -> None:
        """Let the processes of a frozen container go on."""
        await self._call(
            "ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container_id), Empty
        )

    async def update_container(
        self,
        container_id: str,
        resources: oci_pb2.LinuxResources,
        *,
        unified: Mapping[str, str] | None = None,
    ) -> None:
        """Change a container's limits inside the guest.

        :param unified: limits as files of the control group, which only Hako's agent can change.
        :raises InvalidArgument: if another is to.
        """
        if unified and not self.is_hako:
            names = ", ".join(unified)
            raise InvalidArgument(
                f"resources: unified: {names}: the guest's agent cannot change it; leave it out"
            )
        request = agent_pb2.UpdateContainerRequest(container_id=container_id, resources=resources)
        if not self.is_hako:
            _lift(request.resources)
            _leave_out_empty_limits(request.resources)
        await self._call("UpdateContainer", request, Empty)
        if unified:
            lines = "\n".join(f"{name}={value}" for name, value in unified.items())
            await self._diagnose(f"hako.unified {lines}", container_id=container_id, timeout_s=CALL_TIMEOUT_S)

    async def resize_volume(self, mount_point: str, *, size_bytes: int) -> None:
        """Let the file system mounted at a path of the guest fill its disk, which has grown to a size."""
        request = agent_pb2.ResizeVolumeRequest(volume_guest_path=mount_point, size=size_bytes)
        await self._call("ResizeVolume", request, Empty)

    async def stats_container(self, container_id: str) -> agent_pb2.StatsContainerResponse:
        """Measure a container."""
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        return await self._call(
            "StatsContainer", request, agent_pb2.StatsContainerResponse, timeout_s=STATS_TIMEOUT_S
        )

    async def exec_ids_of_processes(self, container_id: str) -> list[str]:
        """List the processes of a container by the ids of their execs; init and children have an empty one.

        Kata's protocol has no call for this; Hako's agent answers it as diagnostic data.

        :raises ShimError: of any kind, if the agent cannot tell.
        """
        lines = await self._diagnose("hako.processes", container_id=container_id)
        return [line.partition(" ")[2] for line in lines.splitlines()]

    async def timeline(self) -> str:
        """Ask what it did and when.

        Kata's protocol has no call for this; Hako's agent answers it as diagnostic data.

        :raises ShimError: of any kind, if the agent cannot tell.
        """
        return await self._diagnose("hako.timeline")

    async def _diagnose(
        self, log_type: str, *, container_id: str = "", timeout_s: float = PROCESSES_TIMEOUT_S
    ) -> str:
        request = agent_pb2.GetDiagnosticDataRequest(log_type=log_type, container_id=container_id)
        reply = await self._call(
            "GetDiagnosticData", request, agent_pb2.GetDiagnosticDataResponse, timeout_s=timeout_s
        )
        return reply.data

    async def next_oom(self) -> str:
        """Block until the guest kernel kills a process for memory.

        :returns: the container it was in.
        """
        reply = await self._call(
            "GetOOMEvent", agent_pb2.GetOOMEventRequest(), agent_pb2.OOMEvent, timeout_s=None
        )
        return reply.container_id

    async def signal_process(self, container_id: str, *, exec_id: str, signal: int) -> None:
        """Send a signal; an empty ``exec_id`` with SIGKILL reaches every process of the container."""
        request = agent_pb2.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=signal)
        await self._call("SignalProcess", request, Empty, timeout_s=SIGNAL_TIMEOUT_S)

    async def wait_process(self, container_id: str, *, exec_id: str) -> int:
        """Block until a process ends.

        :returns: its exit code, or 128 plus the signal number; 255 for one that no process has.
        """
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        reply = await self._call("WaitProcess", request, agent_pb2.WaitProcessResponse, timeout_s=None)
        return reply.status if 0 <= reply.status <= _MAX_STATUS else _MAX_STATUS

    async def read_stdout(self, container_id: str, *, exec_id: str, length: int) -> bytes:
        """Block until there is output; empty means end of file."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=length)
        return (await self._call("ReadStdout", request, agent_pb2.ReadStreamResponse, timeout_s=None)).data

    async def read_stderr(self, container_id: str, *, exec_id: str, length: int) -> bytes:
        """As :meth:`read_stdout`, for standard error."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=length)
        return (await self._call("ReadStderr", request, agent_pb2.ReadStreamResponse, timeout_s=None)).data

    async def write_stdin(self, container_id: str, *, exec_id: str, data: bytes) -> None:
        """Write all of ``data``; blocks while the process does not read, hence no deadline."""
        request = agent_pb2.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
        await self._call("WriteStdin", request, agent_pb2.WriteStreamResponse, timeout_s=None)

    async def close_stdin(self, container_id: str, *, exec_id: str) -> None:
        """Give the process end of file on its input. Not for a terminal: there it means hang-up."""
        request = agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id)
        await self._call("CloseStdin", request, Empty)

    async def resize_terminal(self, container_id: str, *, exec_id: str, rows: int, columns: int) -> None:
        """Set the size of a process' terminal."""
        request = agent_pb2.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=rows, column=columns
        )
        await self._call("TtyWinResize", request, Empty)

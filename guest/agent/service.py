"""The method table: each handler turns one request into a call and its result into a response.

Requests about containers and processes are in their own modules.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

from guest.agent import (
    cgroup,
    clock,
    copy_file,
    files,
    guest_metrics,
    kernel,
    limits,
    oom,
    share_cache,
    sizing,
    storage,
    timeline,
    volume,
)
from guest.agent.container_methods import ContainerMethods
from guest.agent.errors import InvalidArgument
from guest.agent.network import GuestNetwork
from guest.agent.process_methods import ProcessMethods
from proto.extensions import (
    CLOCK,
    CLOCK_FEATURE,
    DROP_CACHES,
    FEATURE,
    LIMITS,
    PROCESSES,
    SHARE_FILES,
    SHELL_FEATURE,
    STREAMS_FEATURE,
    TIMELINE,
    UNIFIED,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.sandbox import Sandbox
    from guest.agent.ttrpc import Call, Handler
    from guest.agent.wire import Codec, Message

VERSION = "0.1.0"
_SERVING = 1
_MEMORY = "/sys/devices/system/memory"
_DROP_CACHES, _PAGES_AND_INODES = "/proc/sys/vm/drop_caches", "3"  # admin-guide/sysctl/vm.rst
_RNDADDTOENTCNT, _RNDRESEEDCRNG = 0x40045201, 0x5207
_BYTES, _INODES = 1, 2


class Service:
    """Both services of the agent.

    :param sandbox: the one sandbox.
    :param codec: makes the responses.
    """

    def __init__(self, sandbox: Sandbox, codec: Codec) -> None:
        self._sandbox = sandbox
        self._codec = codec
        self._empty = codec.new("google.protobuf.Empty")
        self._network = GuestNetwork(codec)

    def handlers(self) -> dict[str, Handler]:
        """Tabulate the handlers; a method of the protocol that is not here is unimplemented.

        :returns: method name to handler.
        """
        return {
            **ContainerMethods(self._sandbox, self._codec).handlers(),
            **ProcessMethods(self._sandbox, self._codec).handlers(),
            "AddARPNeighbors": self._add_neighbours,
            "Check": self._check,
            "CopyFile": self._copy_file,
            "CreateSandbox": self._create_sandbox,
            "DestroySandbox": self._destroy_sandbox,
            "GetDiagnosticData": self._diagnostic_data,
            "GetGuestDetails": self._guest_details,
            "GetMetrics": self._metrics,
            "GetOOMEvent": self._next_oom,
            "GetVolumeStats": self._volume_stats,
            "ListInterfaces": self._list_interfaces,
            "ListRoutes": self._list_routes,
            "OnlineCPUMem": self._online,
            "RemoveStaleVirtiofsShareMounts": self._nothing,
            "ReseedRandomDev": self._reseed,
            "ResizeVolume": self._resize_volume,
            "SetGuestDateTime": self._set_time,
            "UpdateEphemeralMounts": self._update_ephemeral_mounts,
            "UpdateInterface": self._update_interface,
            "UpdateRoutes": self._update_routes,
            "Version": self._version,
        }

    def _check(self, _request: Message, _call: Call) -> Message:
        return self._codec.new("grpc.HealthCheckResponse", status=_SERVING)

    def _version(self, _request: Message, _call: Call) -> Message:
        return self._codec.new("grpc.VersionCheckResponse", grpc_version="0.0.1", agent_version=VERSION)

    def _nothing(self, _request: Message, _call: Call) -> Message:
        return self._empty

    def _create_sandbox(self, request: Message, call: Call) -> Message:
        self._sandbox.create(request)
        # Only the host benefits, so the answer does not wait for it.
        call.afterwards = sizing.report_free_memory
        return self._empty

    def _destroy_sandbox(self, _request: Message, call: Call) -> Message:
        self._sandbox.destroy()
        call.afterwards = kernel.power_off
        return self._empty

    def _next_oom(self, _request: Message, call: Call) -> Message:
        return self._codec.new("grpc.OOMEvent", container_id=oom.next_kill(call))

    def _update_interface(self, request: Message, _call: Call) -> Message:
        if request.interface is None:
            raise InvalidArgument("interface: the request has none; send it")
        self._network.update_interface(request.interface)
        interface: Message = request.interface
        return interface

    def _update_routes(self, request: Message, call: Call) -> Message:
        if request.routes is None:
            raise InvalidArgument("routes: the request has none; send them")
        refused = self._network.update_routes(
            request.routes.Routes, rules=request.rules, settings=request.settings
        )
        answer = self._list_routes(request, call)
        answer.refused = refused
        return answer

    def _list_interfaces(self, _request: Message, _call: Call) -> Message:
        return self._codec.new("grpc.Interfaces", Interfaces=self._network.interfaces())

    def _list_routes(self, _request: Message, _call: Call) -> Message:
        return self._codec.new("grpc.Routes", Routes=self._network.routes())

    def _add_neighbours(self, request: Message, _call: Call) -> Message:
        if request.neighbors is None:
            raise InvalidArgument("neighbours: the request has none; send them")
        self._network.add_neighbours(request.neighbors.ARPNeighbors, complete=request.complete)
        return self._empty

    def _update_ephemeral_mounts(self, request: Message, _call: Call) -> Message:
        for one in request.storages:
            if one.driver == "bind":  # Hako's own: volumes that the host mounts and unmounts later
                self._sandbox.change_volume(one)
            else:
                storage.resize(one)
        return self._empty

    def _volume_stats(self, request: Message, _call: Call) -> Message:
        status = os.statvfs(request.volume_guest_path)
        usage = [
            self._codec.new(
                "grpc.VolumeUsage", unit=unit, total=total, used=total - free, available=available
            )
            for unit, total, free, available in (
                (
                    _BYTES,
                    status.f_blocks * status.f_frsize,
                    status.f_bfree * status.f_frsize,
                    status.f_bavail * status.f_frsize,
                ),
                (_INODES, status.f_files, status.f_ffree, status.f_favail),
            )
        ]
        condition = self._codec.new("grpc.VolumeCondition", message="OK")
        return self._codec.new("grpc.VolumeStatsResponse", usage=usage, volume_condition=condition)

    def _resize_volume(self, request: Message, _call: Call) -> Message:
        volume.grow(request.volume_guest_path, request.size)
        return self._empty

    def _diagnostic_data(self, request: Message, _call: Call) -> Message:
        data = self._of_the_guest(request.log_type)
        if data is None:
            data = self._of_a_container(request)
        return self._codec.new("grpc.GetDiagnosticDataResponse", data=data)

    def _of_the_guest(self, log_type: str) -> str | None:
        """Do what a log type asks for; nothing if it is not about the guest as a whole."""
        if log_type == TIMELINE:
            return timeline.report()
        if log_type.startswith(CLOCK):
            return self._clock(log_type)
        if log_type.startswith(SHARE_FILES):
            share_cache.keep_below(int(log_type.removeprefix(SHARE_FILES)))
        elif log_type == LIMITS:
            limits.follow()
        elif log_type == DROP_CACHES:
            files.write(_DROP_CACHES, _PAGES_AND_INODES)
        else:
            return None
        return ""

    def _of_a_container(self, request: Message) -> str:
        container = self._sandbox.container(request.container_id, InvalidArgument)
        if request.log_type.startswith(UNIFIED):
            for line in request.log_type.removeprefix(f"{UNIFIED} ").splitlines():
                cgroup.set_limit(container.cgroup, *line.split("=", 1))
            return ""
        if request.log_type != PROCESSES:
            raise InvalidArgument(f"diagnostic data: {request.log_type!r}: not kept; ask for {PROCESSES!r}")
        return "\n".join(f"{pid} {exec_id}" for pid, exec_id in container.processes())

    def _clock(self, log_type: str) -> str:
        shift = log_type.removeprefix(CLOCK)
        if shift:
            clock.move(int(shift), at_once=not self._sandbox.is_used)
        return clock.report()

    def _metrics(self, _request: Message, _call: Call) -> Message:
        return self._codec.new("grpc.Metrics", metrics=guest_metrics.report())

    def _guest_details(self, request: Message, _call: Call) -> Message:
        details = self._codec.new(
            "grpc.AgentDetails",
            version=VERSION,
            init_daemon=os.getpid() == 1,
            storage_handlers=list(storage.DRIVERS),
            supports_seccomp=True,
            extra_features=[FEATURE, CLOCK_FEATURE, STREAMS_FEATURE, SHELL_FEATURE, "seccomp"],
        )
        response = self._codec.new("grpc.GuestDetailsResponse", agent_details=details)
        if request.mem_block_size and files.exists(f"{_MEMORY}/block_size_bytes"):
            response.mem_block_size_bytes = int(files.read(f"{_MEMORY}/block_size_bytes"), 16)
        if request.mem_hotplug_probe:
            response.support_mem_hotplug_probe = files.exists(f"{_MEMORY}/probe")
        return response

    def _online(self, request: Message, _call: Call) -> Message:
        if not request.cpu_only:
            sizing.online_memory()
        if request.nb_cpus:
            sizing.use_cpus(request.nb_cpus)
        return self._empty

    def _set_time(self, request: Message, _call: Call) -> Message:
        time.clock_settime_ns(time.CLOCK_REALTIME, request.Sec * 10**9 + request.Usec * 1000)
        return self._empty

    def _reseed(self, request: Message, _call: Call) -> Message:
        if not request.data:
            raise InvalidArgument("reseed: the request has no data; send some")
        fd = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, request.data)
            fcntl.ioctl(fd, _RNDADDTOENTCNT, struct.pack("i", len(request.data) * 8))
            fcntl.ioctl(fd, _RNDRESEEDCRNG)
        finally:
            os.close(fd)
        return self._empty

    def _copy_file(self, request: Message, _call: Call) -> Message:
        copy_file.copy(request)
        return self._empty

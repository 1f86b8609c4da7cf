"""The method table: each handler turns one request into a call and its result into a response."""

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
    kernel,
    limits,
    oom,
    raw_streams,
    sizing,
    storage,
    timeline,
    volume,
)
from guest.agent.errors import AgentError, InvalidArgument
from guest.agent.network import Network

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.container import Container
    from guest.agent.process import Process
    from guest.agent.sandbox import Sandbox
    from guest.agent.ttrpc import Call, Handler
    from guest.agent.wire import Codec, Message

VERSION = "0.1.0"
_SERVING = 1
_MEMORY = "/sys/devices/system/memory"
_RNDADDTOENTCNT, _RNDRESEEDCRNG = 0x40045201, 0x5207
_SIGKILL = 9
_BYTES, _INODES = 1, 2
_PROCESSES, _TIMELINE, _LIMITS = "hako.processes", "hako.timeline", "hako.limits"
_CLOCK, _UNIFIED = "hako.clock", "hako.unified "
"""Log types of our own, for what Kata's protocol has no call: a container's processes, times of the start,
the kernel's limits after a loss of memory. Nanoseconds follow the fourth if the clock is to be moved, and
lines with files of a control group and their values the last."""


class Service:
    """Both services of the agent.

    :param sandbox: the one sandbox.
    :param codec: makes the responses.
    """

    def __init__(self, sandbox: Sandbox, codec: Codec) -> None:
        self._sandbox = sandbox
        self._codec = codec
        self._empty = codec.new("google.protobuf.Empty")
        self._network = Network(codec)

    def handlers(self) -> dict[str, Handler]:
        """Tabulate the handlers; a method of the protocol that is not here is unimplemented.

        :returns: method name to handler.
        """
        return {
            "AddARPNeighbors": self._add_neighbours,
            "Check": self._check,
            "CloseStdin": self._close_stdin,
            "CopyFile": self._copy_file,
            "CreateContainer": self._create_container,
            "CreateSandbox": self._create_sandbox,
            "DestroySandbox": self._destroy_sandbox,
            "ExecProcess": self._exec_process,
            "GetDiagnosticData": self._diagnostic_data,
            "GetGuestDetails": self._guest_details,
            "GetOOMEvent": self._next_oom,
            "GetVolumeStats": self._volume_stats,
            "ListInterfaces": self._list_interfaces,
            "ListRoutes": self._list_routes,
            "OnlineCPUMem": self._online,
            "PauseContainer": self._pause,
            "ReadStderr": self._read_stderr,
            "ReadStdout": self._read_stdout,
            "RemoveContainer": self._remove_container,
            "RemoveStaleVirtiofsShareMounts": self._nothing,
            "ReseedRandomDev": self._reseed,
            "ResizeVolume": self._resize_volume,
            "ResumeContainer": self._resume,
            "SetGuestDateTime": self._set_time,
            "SignalProcess": self._signal,
            "StartContainer": self._start_container,
            "StatsContainer": self._stats,
            "TtyWinResize": self._resize,
            "UpdateContainer": self._update,
            "UpdateEphemeralMounts": self._update_ephemeral_mounts,
            "UpdateInterface": self._update_interface,
            "UpdateRoutes": self._update_routes,
            "Version": self._version,
            "WaitProcess": self._wait,
            "WriteStdin": self._write_stdin,
        }

    def _check(self, _request: Message, _call: Call) -> Message:
        return self._codec.new("grpc.HealthCheckResponse", status=_SERVING)

    def _version(self, _request: Message, _call: Call) -> Message:
        return self._codec.new("grpc.VersionCheckResponse", grpc_version="0.0.1", agent_version=VERSION)

    def _nothing(self, _request: Message, _call: Call) -> Message:
        return self._empty

    def _create_sandbox(self, request: Message, call: Call) -> Message:
        self._sandbox.create(request)
        # Only for the host's sake, so nobody waits for it.
        call.afterwards = sizing.report_free_memory
        return self._empty

    def _destroy_sandbox(self, _request: Message, call: Call) -> Message:
        self._sandbox.destroy()
        call.afterwards = kernel.power_off
        return self._empty

    def _create_container(self, request: Message, _call: Call) -> Message:
        with raw_streams.Claims(request) as claims:
            claims.attach(self._sandbox.create_container(request).init, ended=lambda: None)
        return self._empty

    def _start_container(self, request: Message, _call: Call) -> Message:
        self._sandbox.is_used = True
        self._sandbox.container(request.container_id, AgentError).start()
        return self._empty

    def _remove_container(self, request: Message, _call: Call) -> Message:
        self._sandbox.remove_container(request.container_id, timeout_s=request.timeout)
        return self._empty

    def _exec_process(self, request: Message, _call: Call) -> Message:
        container = self._sandbox.container(request.container_id, AgentError)
        if request.process is None:
            raise AgentError(f"exec: {request.exec_id}: the request has no process; send it")
        with raw_streams.Claims(request) as claims:
            process = container.execute(request.exec_id, request.process)
            claims.attach(process, ended=lambda: container.forget_if_done(request.exec_id))
        return self._empty

    def _process(self, request: Message) -> tuple[Container, Process]:
        container = self._sandbox.container(request.container_id, InvalidArgument)
        return container, container.process(request.exec_id)

    def _signal(self, request: Message, _call: Call) -> Message:
        container, process = self._process(request)
        if not request.exec_id and request.signal == _SIGKILL:
            container.signal_all()
        else:
            process.signal(request.signal)
        return self._empty

    def _wait(self, request: Message, call: Call) -> Message:
        container, process = self._process(request)
        status = process.wait(call)
        oom.settle(container.id)
        if process is container.init and container.shares_pid:
            # In a namespace of its own they would have died with it.
            container.signal_all()
        container.forget_if_done(request.exec_id)
        return self._codec.new("grpc.WaitProcessResponse", status=status)

    def _next_oom(self, _request: Message, call: Call) -> Message:
        return self._codec.new("grpc.OOMEvent", container_id=oom.next_kill(call))

    def _read_stdout(self, request: Message, call: Call) -> Message:
        container, process = self._process(request)
        data = process.read(process.streams.stdout, request.len, call)
        if not data:
            container.forget_if_done(request.exec_id)
        return self._codec.new("grpc.ReadStreamResponse", data=data)

    def _read_stderr(self, request: Message, call: Call) -> Message:
        container, process = self._process(request)
        data = process.read(process.streams.stderr, request.len, call)
        if not data:
            container.forget_if_done(request.exec_id)
        return self._codec.new("grpc.ReadStreamResponse", data=data)

    def _write_stdin(self, request: Message, call: Call) -> Message:
        _container, process = self._process(request)
        if request.data:
            process.streams.stdin.write(request.data, process.end, call)
        else:
            process.end_input()
        return self._codec.new("grpc.WriteStreamResponse", len=len(request.data))

    def _close_stdin(self, request: Message, _call: Call) -> Message:
        self._process(request)[1].end_input()
        return self._empty

    def _resize(self, request: Message, _call: Call) -> Message:
        self._process(request)[1].streams.resize(request.row, request.column)
        return self._empty

    def _pause(self, request: Message, _call: Call) -> Message:
        self._sandbox.container(request.container_id, InvalidArgument).freeze(frozen=True)
        return self._empty

    def _resume(self, request: Message, _call: Call) -> Message:
        self._sandbox.container(request.container_id, InvalidArgument).freeze(frozen=False)
        return self._empty

    def _update(self, request: Message, _call: Call) -> Message:
        container = self._sandbox.container(request.container_id, InvalidArgument)
        if request.resources is not None:  # as Kata's agent has it: nothing is to be changed
            container.update(request.resources)
        return self._empty

    def _stats(self, request: Message, _call: Call) -> Message:
        container = self._sandbox.container(request.container_id, InvalidArgument)
        counted = cgroup.stats(container.cgroup, self._codec)
        return self._codec.new("grpc.StatsContainerResponse", cgroup_stats=counted)

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
            if one.driver == "bind":  # Hako's own: volumes that the host mounts and unmounts meanwhile
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
        if request.log_type == _TIMELINE:
            return self._codec.new("grpc.GetDiagnosticDataResponse", data=timeline.report())
        if request.log_type == _LIMITS:
            limits.follow()
            return self._codec.new("grpc.GetDiagnosticDataResponse")
        if request.log_type.startswith(_CLOCK):
            return self._codec.new("grpc.GetDiagnosticDataResponse", data=self._clock(request.log_type))
        container = self._sandbox.container(request.container_id, InvalidArgument)
        if request.log_type.startswith(_UNIFIED):
            for line in request.log_type.removeprefix(_UNIFIED).splitlines():
                cgroup.set_limit(container.cgroup, *line.split("=", 1))
            return self._codec.new("grpc.GetDiagnosticDataResponse")
        if request.log_type != _PROCESSES:
            raise InvalidArgument(f"diagnostic data: {request.log_type!r}: not kept; ask for {_PROCESSES!r}")
        lines = [f"{pid} {exec_id}" for pid, exec_id in container.processes()]
        return self._codec.new("grpc.GetDiagnosticDataResponse", data="\n".join(lines))

    def _clock(self, log_type: str) -> str:
        shift = log_type.removeprefix(_CLOCK)
        if shift:
            clock.move(int(shift), at_once=not self._sandbox.is_used)
        return clock.report()

    def _guest_details(self, request: Message, _call: Call) -> Message:
        details = self._codec.new(
            "grpc.AgentDetails",
            version=VERSION,
            init_daemon=os.getpid() == 1,
            storage_handlers=list(storage.DRIVERS),
            supports_seccomp=True,
            extra_features=["hako", "hako.clock", "hako.streams", "seccomp"],
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

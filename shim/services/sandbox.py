"""containerd's Sandbox service: it creates, queries and ends the machine without a container."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from proto.containerd import sandbox_v1_pb2 as api
from proto.containerd import types_pb2
from shim.errors import NotFound
from shim.machine import pod
from shim.telemetry.events import pack
from shim.telemetry.metrics import host_has_cgroup_v2, to_metrics
from shim.telemetry.timestamps import to_timestamp

if TYPE_CHECKING:
    from shim.sandbox.containers import Containers
    from shim.sandbox.sandbox import Sandbox

# The states of Kubernetes' container runtime interface; containerd reads any other as not ready.
_READY = "SANDBOX_READY"
_NOT_READY = "SANDBOX_NOTREADY"


class SandboxService:
    """Translates requests to the sandbox and its answers to replies.

    :param sandbox: the machine of this shim.
    :param containers: its containers.
    """

    def __init__(self, sandbox: Sandbox, containers: Containers) -> None:
        self._sandbox = sandbox
        self._containers = containers

    async def create_sandbox(self, request: api.CreateSandboxRequest) -> api.CreateSandboxResponse:
        """Start to boot the machine, unless it already boots because the bundle has a specification."""
        self._require(request.sandbox_id, what="create")
        with self._sandbox.tracing.failures(), self._sandbox.counting.failures("create"):
            description = pod.from_request(
                request.options, sandbox_id=request.sandbox_id, network_namespace=request.netns_path
            )
            self._sandbox.hold(description)
        return api.CreateSandboxResponse()

    async def start_sandbox(self, request: api.StartSandboxRequest) -> api.StartSandboxResponse:
        """Wait until the machine runs."""
        self._require(request.sandbox_id, what="start")
        with self._sandbox.tracing.failures():
            await self._sandbox.running()
        return api.StartSandboxResponse(
            pid=self._sandbox.pid, created_at=to_timestamp(self._sandbox.created_at_s)
        )

    async def platform(self, request: api.PlatformRequest) -> api.PlatformResponse:
        """Report the platform of the machine."""
        self._require(request.sandbox_id, what="platform")
        return api.PlatformResponse(platform=types_pb2.Platform(os="linux", architecture="amd64"))

    async def stop_sandbox(self, request: api.StopSandboxRequest) -> api.StopSandboxResponse:
        """Switch the machine off, faster than any timeout in a request; repeating it is harmless."""
        self._require(request.sandbox_id, what="stop")
        await self._containers.end()
        return api.StopSandboxResponse()

    async def wait_sandbox(self, request: api.WaitSandboxRequest) -> api.WaitSandboxResponse:
        """Block until the machine has ended."""
        self._require(request.sandbox_id, what="wait")
        await self._sandbox.ended.wait()
        return api.WaitSandboxResponse(
            exit_status=self._sandbox.exit_status, exited_at=to_timestamp(self._sandbox.ended_at_s)
        )

    async def sandbox_status(self, request: api.SandboxStatusRequest) -> api.SandboxStatusResponse:
        """Report the state that the shim knows, without asking the guest."""
        self._require(request.sandbox_id, what="status")
        sandbox = self._sandbox
        response = api.SandboxStatusResponse(
            sandbox_id=sandbox.id,
            pid=sandbox.pid,
            state=_READY if sandbox.is_ready else _NOT_READY,
            created_at=to_timestamp(sandbox.created_at_s),
            exited_at=to_timestamp(sandbox.ended_at_s),
        )
        if request.verbose:
            details = {
                "pid": sandbox.pid,
                "stateDirectory": str(sandbox.directory),
                "reason": sandbox.reason_of_end,
            }
            response.info["info"] = json.dumps(details)
        return response

    async def ping_sandbox(self, request: api.PingRequest) -> api.PingResponse:
        """Check that the agent in the machine answers."""
        self._require(request.sandbox_id, what="ping")
        await self._sandbox.ping()
        return api.PingResponse()

    async def shutdown_sandbox(self, request: api.ShutdownSandboxRequest) -> api.ShutdownSandboxResponse:
        """Switch the machine off and end the shim, even if containers are left; the reply is sent first."""
        self._require(request.sandbox_id, what="shutdown")
        await self._containers.dismiss()
        return api.ShutdownSandboxResponse()

    async def sandbox_metrics(self, request: api.SandboxMetricsRequest) -> api.SandboxMetricsResponse:
        """Measure all containers together, in the message of the host's cgroup version."""
        self._require(request.sandbox_id, what="metrics")
        stats = await self._containers.stats()
        return api.SandboxMetricsResponse(
            metrics=types_pb2.Metric(
                timestamp=to_timestamp(time.time()),
                id=self._sandbox.id,
                data=pack(to_metrics(stats, unified=host_has_cgroup_v2())),
            )
        )

    def _require(self, sandbox_id: str, *, what: str) -> None:
        if sandbox_id != self._sandbox.id:
            raise NotFound(f"{what}: sandbox {sandbox_id}: not found")

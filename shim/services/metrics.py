"""The service for monitors; see ``proto/hako/metrics.proto``."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import TYPE_CHECKING

from proto.hako import metrics_pb2
from shim.annotations import POD_NAME, POD_NAMESPACE, POD_UID
from shim.errors import DeadlineExceeded, NotFound, ShimError, Unimplemented
from shim.sandbox.guest_container import GuestContainer
from shim.telemetry import latency
from shim.version import version

if TYPE_CHECKING:
    from collections.abc import Iterable

    from proto.kata.agent_pb2 import StatsContainerResponse
    from shim.machine.machine import Machine
    from shim.sandbox.container import Container
    from shim.sandbox.containers import Containers
    from shim.sandbox.sandbox import Sandbox
    from shim.telemetry.latency import Latencies

_NS_PER_S = 10**9
_MOST_GUEST_TEXT = 256 << 10

Reply = metrics_pb2.ReadResponse


class MetricsService:
    """Collects the numbers of one sandbox.

    :param sandbox: the life of its machine.
    :param containers: what is in it.
    :param machine: the machine.
    """

    def __init__(self, sandbox: Sandbox, containers: Containers, machine: Machine) -> None:
        self._sandbox = sandbox
        self._containers = containers
        self._machine = machine

    async def read(self, request: metrics_pb2.ReadRequest) -> Reply:
        """Return the shim's numbers, and the guest's if it answers in time."""
        sandbox, containers = self._sandbox, self._containers.all.values()
        reply = Reply(
            id=sandbox.id,
            namespace=sandbox.namespace,
            version=version(),
            state=self._containers.parking.condition,
            processes=[
                Reply.Process(name="shim", pid=os.getpid()),
                *(Reply.Process(name=each.name, pid=each.pid) for each in self._machine.processes()),
            ],
            containers=Counter(each.init.state.name.lower() for each in containers),
            shim_calls=_histograms(latency.SHIM),
            agent_calls=_histograms(latency.AGENT),
            qmp_calls=_histograms(latency.QMP),
            dropped=latency.dropped,
        )
        annotations = sandbox.pod.oci.get("annotations")
        if isinstance(annotations, dict) and POD_NAME in annotations:
            reply.pod.name = annotations[POD_NAME]
            reply.pod.namespace = annotations.get(POD_NAMESPACE, "")
            reply.pod.uid = annotations.get(POD_UID, "")
        if request.guest_timeout_s > 0 and sandbox.is_ready:
            try:
                async with asyncio.timeout(request.guest_timeout_s):
                    reply.usage.extend(await self._usage(containers, request.guest_timeout_s))
                    reply.guest = await self._guest_text()
            except (TimeoutError, DeadlineExceeded):
                reply.problem = f"the guest did not answer within {request.guest_timeout_s:g} s"
            except ShimError as error:
                reply.problem = str(error)
        return reply

    async def _usage(self, containers: Iterable[Container], timeout_s: float) -> list[Reply.ContainerUsage]:
        live = [
            each for each in containers if isinstance(each, GuestContainer) and not each.init.exited.is_set()
        ]
        measured = await asyncio.gather(*(_stats(each, timeout_s) for each in live))
        return [
            Reply.ContainerUsage(
                id=container.id,
                memory_bytes=stats.cgroup_stats.memory_stats.usage.usage,
                cpu_s=stats.cgroup_stats.cpu_stats.cpu_usage.total_usage / _NS_PER_S,
                processes=stats.cgroup_stats.pids_stats.current,
            )
            for container, stats in zip(live, measured, strict=True)
            if stats is not None
        ]

    async def _guest_text(self) -> str:
        machine = await self._sandbox.running(awake=False)
        if not machine.parking.is_awake:
            return ""
        try:
            return (await machine.agent.metrics())[:_MOST_GUEST_TEXT]
        except Unimplemented:
            return ""


async def _stats(container: GuestContainer, timeout_s: float) -> StatsContainerResponse | None:
    """Measure one container; None if it ends meanwhile."""
    try:
        return await container.stats(timeout_s=timeout_s)
    except NotFound:
        return None


def _histograms(latencies: Latencies) -> list[Reply.Histogram]:
    return [
        Reply.Histogram(name=name, buckets=histogram.buckets, sum_ms=histogram.sum_ms)
        for name, histogram in latencies.by_name.items()
    ]

"""One connection to a guest's agent: Kata's agent protocol over multiplexed ttrpc.

Every call has a deadline, except those that wait for the guest's own events: WaitProcess, GetOOMEvent and the
streams. These long calls share the connection with all others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from proto.kata import agent_pb2, health_pb2
from shim.agent.gate import Gate
from shim.agent.stock_errors import plain
from shim.errors import ShimError
from shim.telemetry import latency

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from shim.transport.ttrpc_client import TtrpcClient

SERVICE = "grpc.AgentService"
HEALTH_SERVICE = "grpc.Health"

CALL_TIMEOUT_S = 60.0  # the protocol's customary limit, for example Kata's create_container_timeout
MOST_ANSWER_BYTES = 2 << 20
"""The most bytes in the answer to a call for a stream, for routes, or for a container's processes."""
DIAGNOSIS_TIMEOUT_S = 1.0  # containerd asks for pids within the 5 s that a restart gives a shim

_Reply = TypeVar("_Reply", bound="Message")


@dataclass(frozen=True, slots=True)
class AgentFeatures:
    """The features that an agent has announced.

    :param is_hako: whether it is Hako's, which keeps a process's streams after its end; a stock agent forgets
        them with the first answer to WaitProcess.
    :param supports_seccomp: whether it applies seccomp profiles.
    :param frames_streams: whether it carries a stream in frames over its own connection.
    :param tells_time: whether it can report the guest's time.
    :param runs_shells: whether it runs processes in the guest itself.
    """

    is_hako: bool = False
    supports_seccomp: bool = False
    frames_streams: bool = False
    tells_time: bool = False
    runs_shells: bool = False


class AgentConnection:
    """Calls to the agent of one sandbox.

    :param client: a ttrpc client over a connection to the guest's agent port.
    """

    def __init__(self, client: TtrpcClient) -> None:
        self._client = client
        self.features = AgentFeatures()
        self.gate = Gate()

    async def call(
        self,
        method: str,
        request: Message,
        reply: type[_Reply],
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
        most_bytes: int = MOST_ANSWER_BYTES,
    ) -> _Reply:
        """Call a method of the agent's service.

        A parked machine is woken first, unless the call has no limit: such a call waits.

        :param method: its name in the protocol.
        :param request: its request.
        :param reply: the type of its answer.
        :param timeout_s: how long the answer may take; None for no limit.
        :param most_bytes: the most bytes of the answer; a hostile one with many parts would cost much time.
        :raises DeadlineExceeded: if it takes longer.
        :raises Unavailable: if the connection breaks.
        :raises ResourceExhausted: if the answer is too long.
        :raises ShimError: of the kind that the agent answers with.
        """
        if timeout_s is None:
            await self.gate.free()
            return await self._call(method, request, reply, timeout_s=None, most_bytes=most_bytes)
        with await self.gate.asking():
            began_s = time.monotonic()
            try:
                return await self._call(method, request, reply, timeout_s=timeout_s, most_bytes=most_bytes)
            finally:
                latency.AGENT.observe(method, time.monotonic() - began_s)

    async def _call(
        self,
        method: str,
        request: Message,
        reply: type[_Reply],
        *,
        timeout_s: float | None,
        most_bytes: int,
    ) -> _Reply:
        try:
            return await self._client.call(
                SERVICE, method, request, reply, timeout_s=timeout_s, most_bytes=most_bytes
            )
        except ShimError as error:
            meant = plain(error)
            if meant is error:
                raise
            raise meant from error

    async def diagnose(
        self, log_type: str, *, container_id: str = "", timeout_s: float = DIAGNOSIS_TIMEOUT_S
    ) -> str:
        """Ask for diagnostic data; in this form, Hako's agent accepts calls that Kata's protocol lacks.

        :param log_type: the call and its argument.
        :param container_id: the agent's id of the container in question.
        :returns: the data.
        :raises ShimError: of any kind, if the agent does not answer it.
        """
        request = agent_pb2.GetDiagnosticDataRequest(log_type=log_type, container_id=container_id)
        answer = await self.call(
            "GetDiagnosticData", request, agent_pb2.GetDiagnosticDataResponse, timeout_s=timeout_s
        )
        return answer.data

    async def check(self, *, timeout_s: float) -> None:
        """Wait for the agent's first answer.

        :raises DeadlineExceeded: if it does not arrive in time.
        :raises Unavailable: if the connection breaks.
        """
        with await self.gate.asking():
            await self._client.call(
                HEALTH_SERVICE,
                "Check",
                health_pb2.CheckRequest(),
                health_pb2.HealthCheckResponse,
                timeout_s=timeout_s,
            )

    async def aclose(self) -> None:
        """Close the connection; pending calls fail with Unavailable."""
        await self._client.aclose()

    async def wait_closed(self) -> None:
        """Block until the connection is lost or closed."""
        await self._client.wait_closed()

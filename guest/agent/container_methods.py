"""The protocol's methods about containers."""

from __future__ import annotations

from guest.agent import cgroup, raw_streams
from guest.agent.errors import AgentError, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.sandbox import Sandbox
    from guest.agent.ttrpc import Call, Handler
    from guest.agent.wire import Codec, Message


class ContainerMethods:
    """Handlers of the requests about containers.

    :param sandbox: the one sandbox.
    :param codec: makes the responses.
    """

    def __init__(self, sandbox: Sandbox, codec: Codec) -> None:
        self._sandbox = sandbox
        self._codec = codec
        self._empty = codec.new("google.protobuf.Empty")

    def handlers(self) -> dict[str, Handler]:
        """Tabulate the handlers.

        :returns: method name to handler.
        """
        return {
            "CreateContainer": self._create_container,
            "PauseContainer": self._pause,
            "RemoveContainer": self._remove_container,
            "ResumeContainer": self._resume,
            "StartContainer": self._start_container,
            "StatsContainer": self._stats,
            "UpdateContainer": self._update,
        }

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

    def _pause(self, request: Message, _call: Call) -> Message:
        self._sandbox.container(request.container_id, InvalidArgument).freeze(frozen=True)
        return self._empty

    def _resume(self, request: Message, _call: Call) -> Message:
        self._sandbox.container(request.container_id, InvalidArgument).freeze(frozen=False)
        return self._empty

    def _update(self, request: Message, _call: Call) -> Message:
        container = self._sandbox.container(request.container_id, InvalidArgument)
        if request.resources is not None:  # like Kata's agent: nothing to change
            container.update(request.resources)
        return self._empty

    def _stats(self, request: Message, _call: Call) -> Message:
        container = self._sandbox.container(request.container_id, InvalidArgument)
        counted = cgroup.stats(container.cgroup, self._codec)
        return self._codec.new("grpc.StatsContainerResponse", cgroup_stats=counted)

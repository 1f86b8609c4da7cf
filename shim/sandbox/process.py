"""One process of a container: its states, and its record after its exit.

The life is a table of (state, input); everything else is refused. Time and status of the exit are set once,
by the first report: of the guest's agent, or of the virtual machine's death.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from shim.agent import guest_names
from shim.errors import FailedPrecondition
from shim.override import override
from shim.sandbox.stream_copying import DRAIN_TIMEOUT_S

if TYPE_CHECKING:
    from shim.agent.guest_streams import GuestStreams
    from shim.sandbox.host_streams import HostStreams, Stdio
    from shim.sandbox.stream_copying import StreamCopier

log = logging.getLogger(__name__)


class State(enum.Enum):
    """The state of a process."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    DELETED = "deleted"


class Input(enum.Enum):
    """The events in the life of a process."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    EXIT = "exit"
    DELETE = "delete"


TRANSITIONS: dict[tuple[State, Input], State] = {
    (State.CREATED, Input.START): State.RUNNING,
    (State.CREATED, Input.EXIT): State.STOPPED,
    (State.CREATED, Input.DELETE): State.DELETED,
    (State.RUNNING, Input.PAUSE): State.PAUSED,
    (State.RUNNING, Input.EXIT): State.STOPPED,
    (State.PAUSED, Input.RESUME): State.RUNNING,
    (State.PAUSED, Input.EXIT): State.STOPPED,
    (State.STOPPED, Input.DELETE): State.DELETED,
}


class Process:
    """A container's init, or one exec.

    :param container_id: the container that it belongs to.
    :param exec_id: containerd's id of the exec; empty for init.
    :param stdio: the stream paths as the client gave them.
    :param spec: the OCI process of an exec, kept until Start; empty for init.
    """

    def __init__(self, container_id: str, *, exec_id: str, stdio: Stdio, spec: dict[str, Any]) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        # The agent's exec ids share one space per container with its init, and a client may use an id
        # again after deleting it: a fresh name can never collide.
        self.agent_id = uuid.uuid4().hex if exec_id else guest_names.agent_id(container_id)
        self.stdio = stdio
        self.spec = spec
        self.state = State.CREATED
        self.starting = False
        self.host_streams: HostStreams | None = None
        self.guest_streams: GuestStreams | None = None
        self.copier: StreamCopier | None = None
        self.following: asyncio.Task[None] | None = None
        self.terminal_size: tuple[int, int] | None = None
        self.exit_status = 0
        self.exited_at_s: float | None = None
        self.started = asyncio.Event()
        self.heard = asyncio.Event()  # the client has the first byte of output
        self.ended = asyncio.Event()  # as the guest reports; output may still be on its way
        self.exited = asyncio.Event()

    @override
    def __str__(self) -> str:
        return (
            f"exec {self.exec_id} of {self.container_id}"
            if self.exec_id
            else f"container {self.container_id}"
        )

    @property
    def event_id(self) -> str:
        """The ``id`` field of TaskExit: the exec id, or the container id for init."""
        return self.exec_id or self.container_id

    def apply(self, happening: Input) -> None:
        """Move along the table.

        :raises FailedPrecondition: if the table has no such transition.
        """
        following = TRANSITIONS.get((self.state, happening))
        if following is None:
            raise FailedPrecondition(f"{happening.value}: {self}: it is {self.state.value}")
        self.state = following
        if happening is Input.START:
            self.started.set()

    def require(self, happening: Input) -> None:
        """Refuse now what :meth:`apply` would refuse later, before any work is done.

        :raises FailedPrecondition: if the table has no such transition.
        """
        if (self.state, happening) not in TRANSITIONS:
            raise FailedPrecondition(f"{happening.value}: {self}: it is {self.state.value}")

    def close_streams(self) -> None:
        """Close both ends of the streams, as far as they are open."""
        if self.host_streams is not None:
            self.host_streams.close_all()
            self.host_streams = None
        if self.guest_streams is not None:
            self.guest_streams.close()

    async def drained(self) -> None:
        """Wait until the client has read the output, unless the client stops reading."""
        if self.following is None or self.copier is None:
            return
        if not await self.copier.drained({self.following}):
            log.warning("delete: %s: output not read for %.0f s; dropping it", self, DRAIN_TIMEOUT_S)
            self.following.cancel()
            await asyncio.wait({self.following})

    def exit(self, status: int) -> bool:
        """Record the end of the process; waiters are released.

        :param status: exit code, or 128 plus the signal number.
        :returns: False if it had already ended; then nothing is changed.
        """
        if self.exited.is_set():
            return False
        self.apply(Input.EXIT)
        self.exit_status = status
        self.exited_at_s = time.time()
        self.exited.set()
        return True

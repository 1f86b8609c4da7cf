"""QEMU's control connection: one coroutine per intent, typed results, death as an event."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from hypervisor.errors import QmpError
from hypervisor.exits import Shutdown

if TYPE_CHECKING:
    from contextlib import ExitStack

    from qemu.qmp.message import Message

_COMMAND_TIMEOUT_S = 10.0
_DRIVER_OK = "VIRTIO_CONFIG_S_DRIVER_OK"

_BROKEN_STATES = frozenset({"internal-error", "io-error"})
"""Values of QEMU's ``RunState`` in which the guest will never run again by itself."""

# The library reports a connection that ends as an error; for this program that is the ordinary end of a
# virtual machine, and every failure that matters is raised to the caller anyway.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class _Lifecycle(EventListener):
    """Keeps what tells how the guest ends, and none of the other events."""

    def __init__(self) -> None:
        super().__init__()
        self.shutdown: Shutdown | None = None
        self.shut_down = asyncio.Event()
        self.stopped = asyncio.Event()

    async def put(self, event: Message) -> None:
        """Note a ``SHUTDOWN`` or ``STOP`` event.

        :param event: any event, as QEMU sent it.
        """
        match event["event"]:
            case "SHUTDOWN":
                data: Any = event.get("data")
                if isinstance(data, dict):  # an exception here would end the session
                    self.shutdown = Shutdown(
                        by_guest=bool(data.get("guest")), cause=str(data.get("reason", "unknown"))
                    )
                self.shut_down.set()
            case "STOP":
                self.stopped.set()


class CommandRefusedError(QmpError):
    """QEMU understood and said no, or does not know the command."""


class QmpSession:
    """A session with one QEMU process.

    :param name: the virtual machine's name, for the library's log.
    :param handover: closes QEMU's end of the socket once QEMU has inherited it.
    """

    def __init__(self, name: str, *, handover: ExitStack) -> None:
        # A pair rather than a path: connected before QEMU exists, so that its death at any moment is an end
        # of file; and nobody else can connect.
        self._stream, qemu_end = socket.socketpair()
        handover.enter_context(qemu_end)
        self.qemu_fd = qemu_end.fileno()
        self._client = QMPClient(name)
        # The library keeps a history of every event for as long as it lives; nobody reads it here.
        self._client.events.event_filter = lambda _event: False
        self._lifecycle = _Lifecycle()
        self._client.register_listener(self._lifecycle)

    @property
    def shutdown(self) -> Shutdown | None:
        """The last ``SHUTDOWN`` event, or ``None`` if there was none."""
        return self._lifecycle.shutdown

    async def connect(self) -> None:
        """Read the greeting and negotiate capabilities.

        :raises QmpError: if QEMU hangs up or does not speak QMP.
        """
        try:
            await self._client.connect(self._stream)
        except ConnectError as error:
            raise QmpError(f"qmp: connect: {error.exc or error}") from error
        except AssertionError as error:  # the library's own, if the connection ends in its very last step
            raise QmpError("qmp: connect: the connection ended during negotiation") from error

    async def run_state(self) -> str:
        """Return QEMU's ``RunState``, for example ``running``.

        :raises QmpError: if QEMU does not answer.
        """
        reply = await self._execute("query-status")
        return str(reply.get("status"))

    async def driver_runs(self, device: str) -> bool:
        """Tell whether the guest's driver has taken a virtio device into use (DRIVER_OK of virtio 1.2, 2.1).

        :param device: the device's id.
        :returns: also true of a QEMU that cannot tell.
        :raises QmpError: if QEMU does not answer.
        """
        try:
            reply = await self._execute(
                "x-query-virtio-status", path=f"/machine/peripheral/{device}/virtio-backend"
            )
        except CommandRefusedError:
            return True
        status = reply.get("status")
        named = status.get("statuses") if isinstance(status, dict) else None
        return isinstance(named, list) and any(str(each).startswith(_DRIVER_OK) for each in named)

    async def broken(self) -> str:
        """Wait until QEMU has stopped the guest for good; for ever if QEMU ends first.

        A failure inside KVM ends no process: QEMU stops the virtual CPUs and waits for somebody to look.

        :returns: the run state that says so.
        """
        while True:
            await self._lifecycle.stopped.wait()
            self._lifecycle.stopped.clear()
            with contextlib.suppress(QmpError):
                state = await self.run_state()
                if state in _BROKEN_STATES:
                    return state

    async def shut_down(self) -> None:
        """Wait for a ``SHUTDOWN`` event; for ever if QEMU ends without one."""
        await self._lifecycle.shut_down.wait()

    async def close(self) -> None:
        """End the session after every event that QEMU sent has been read, if QEMU is gone."""
        # How QEMU ended is known from its process, not from its socket; the rest is what the library's reader
        # ends with if it was told what is no QMP.
        with contextlib.suppress(EOFError, OSError, QMPError, ValueError, RecursionError):
            await self._client.disconnect()
        self._stream.close()

    async def drained(self) -> None:
        """Wait until QEMU has closed its end and every event before that has been seen."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def _execute(self, command: str, **arguments: object) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT_S):
                reply: Any = await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            raise CommandRefusedError(f"qmp: {command}: {error}") from error
        except TimeoutError:
            raise QmpError(f"qmp: {command}: no answer within {_COMMAND_TIMEOUT_S:g} s") from None
        except QMPError as error:
            raise QmpError(f"qmp: {command}: {error}") from error
        if not isinstance(reply, dict):
            raise QmpError(f"qmp: {command}: unexpected reply {reply!r}")
        return reply

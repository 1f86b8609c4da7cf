"""QEMU's control connection: one coroutine per intent, typed results, death as an event."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPError
from qemu.qmp.protocol import Runstate

from hypervisor import qmp_client
from hypervisor.errors import QmpError
from hypervisor.exits import Shutdown
from hypervisor.lasting_socket import LastingSocket
from hypervisor.override import override
from hypervisor.qmp_client import GuardedClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import ExitStack

    from qemu.qmp.message import Message

    from hypervisor.host_side import OnCommand

_T = TypeVar("_T")

_COMMAND_TIMEOUT_S = 10.0
_DRIVER_OK = "VIRTIO_CONFIG_S_DRIVER_OK"

_BROKEN_STATES = frozenset({"internal-error", "io-error"})
"""Values of QEMU's ``RunState`` in which the guest never runs again without a command."""

# The library reports a connection that ends as an error; for this program that is the ordinary end of a
# virtual machine, and every failure that matters is raised to the caller anyway.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class _Lifecycle(EventListener):
    """Keeps only the events about the guest's end."""

    def __init__(self) -> None:
        super().__init__()
        self.shutdown: Shutdown | None = None
        self.shut_down = asyncio.Event()
        self.stopped = asyncio.Event()

    @override
    async def put(self, event: Message) -> None:
        """Note a ``SHUTDOWN`` or ``STOP`` event.

        :param event: any event, as QEMU sent it.
        """
        match event["event"]:
            case qmp_client.SHUTDOWN:
                data: Any = event.get("data")
                if isinstance(data, dict):  # an exception here would end the session
                    self.shutdown = Shutdown(
                        by_guest=bool(data.get("guest")), cause=str(data.get("reason", "unknown"))
                    )
                self.shut_down.set()
            case qmp_client.STOP:
                self.stopped.set()


class CommandRefusedError(QmpError):
    """QEMU refused the command, or does not know it.

    :param message: the whole line.
    :param kind: the error's class in QMP, for example ``DeviceNotFound``.
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Event:
    """Something QEMU reported.

    :param name: for example ``DEVICE_DELETED``.
    :param data: its data.
    """

    name: str
    data: Mapping[str, Any]


class _Queue(EventListener):
    """A listener that does not keep a record of all events, as the library's does."""

    @override
    async def put(self, event: Message) -> None:
        if self.accept(event):
            await self._queue.put(event)


class EventStream:
    """Events in the order in which QEMU sent them, made by ``QmpSession.events``.

    :param session: where they come from.
    :param names: which ones are wanted.
    """

    def __init__(self, session: QmpSession, names: tuple[str, ...]) -> None:
        self._session = session
        self.listener = _Queue(names)

    async def next(self) -> Event:
        """Wait for the next event.

        :raises QmpError: if the session ended before it.
        """
        ended = asyncio.ensure_future(self._session.drained())
        heard = asyncio.ensure_future(self.listener.get())
        try:
            await asyncio.wait((ended, heard), return_when=asyncio.FIRST_COMPLETED)
            if not heard.done():
                raise QmpError("qmp: the session ended while an event was awaited")
            message: Any = heard.result()
            data = message.get("data")
            return Event(str(message["event"]), data if isinstance(data, dict) else {})
        finally:
            ended.cancel()
            heard.cancel()


class QmpSession:
    """A session with one QEMU process.

    :param name: the virtual machine's name, for the library's log.
    :param handover: closes QEMU's end of the socket once QEMU has inherited it.
    :param on_command: called with the name of each command that is over, and how many seconds it took.
    """

    def __init__(self, name: str, *, handover: ExitStack, on_command: OnCommand | None = None) -> None:
        self._on_command = on_command
        # A pair rather than a path: it is connected before QEMU exists, so that QEMU's death at any moment is
        # an end of file, and no other process can connect.
        own_end, qemu_end = socket.socketpair()
        self._stream = LastingSocket(own_end)
        handover.enter_context(qemu_end)
        self.qemu_fd = qemu_end.fileno()
        self._client = GuardedClient(name)
        # The library would keep every event for its whole life, but no code here reads that history.
        self._client.events.event_filter = lambda _event: False
        self._lifecycle = _Lifecycle()
        self._client.register_listener(self._lifecycle)
        self._fd_names = itertools.count()
        self._fd_lock = asyncio.Lock()
        self._busy_until_s = 0.0
        """When QEMU will have finished its longest command; it executes one after the other."""

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
        except (
            AssertionError
        ) as error:  # the library's own exception, if the connection ends in its very last step
            raise QmpError("qmp: connect: the connection ended during negotiation") from error

    async def run_state(self) -> str:
        """Return QEMU's ``RunState``, for example ``running``.

        :raises QmpError: if QEMU does not answer.
        """
        reply = await self.ask(dict, "query-status")
        return str(reply.get("status"))

    @property
    def version(self) -> str:
        """QEMU's version and package, as it said in its greeting."""
        greeting = self._client.greeting
        said: Any = greeting.QMP.version if greeting else {}
        numbers = said.get("qemu", {})
        version = ".".join(str(numbers.get(part)) for part in ("major", "minor", "micro"))
        return f"{version} {said.get('package', '')}".strip()

    async def driver_runs(self, device: str) -> bool:
        """Tell whether the guest's driver has taken a virtio device into use (DRIVER_OK of virtio 1.2, 2.1).

        :param device: the device's id.
        :returns: true, too, if this QEMU cannot tell.
        :raises QmpError: if QEMU does not answer.
        """
        try:
            reply = await self.ask(
                dict, "x-query-virtio-status", {"path": f"/machine/peripheral/{device}/virtio-backend"}
            )
        except CommandRefusedError:
            return True
        status = reply.get("status")
        named = status.get("statuses") if isinstance(status, dict) else None
        return isinstance(named, list) and any(str(each).startswith(_DRIVER_OK) for each in named)

    async def broken(self) -> str:
        """Wait until QEMU has stopped the guest for good; forever if QEMU ends first.

        After a failure inside KVM, QEMU does not end: it stops the virtual CPUs and waits for an operator.

        :returns: that run state.
        """
        while True:
            await self._lifecycle.stopped.wait()
            self._lifecycle.stopped.clear()
            with contextlib.suppress(QmpError):
                state = await self.run_state()
                if state in _BROKEN_STATES:
                    return state

    async def flooded(self) -> str:
        """Wait until the guest has caused far more events than an honest guest; forever if it never does.

        :returns: the name of the last event.
        """
        return await asyncio.shield(self._client.flooded)

    async def shut_down(self) -> None:
        """Wait for a ``SHUTDOWN`` event; forever if QEMU ends without one."""
        await self._lifecycle.shut_down.wait()

    async def close(self) -> None:
        """End the session after every event that QEMU sent has been read, if QEMU is gone."""
        # How QEMU ended is learnt from its process, not from its socket. The library's reader may also end
        # with an error if it has read anything but QMP.
        with contextlib.suppress(EOFError, OSError, QMPError, ValueError, RecursionError):
            await self._client.disconnect()
        self._stream.close()

    @property
    def is_open(self) -> bool:
        """Whether QEMU has not hung up."""
        return self._client.runstate is Runstate.RUNNING

    async def drained(self) -> None:
        """Wait until QEMU has closed its end, and all earlier events have been seen."""
        while self.is_open:
            await self._client.runstate_changed()

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventStream]:
        """Collect events from now until the block ends, including all that commands in the block cause.

        :param names: which ones.
        """
        stream = EventStream(self, names)
        self._client.register_listener(stream.listener)
        self._client.wanted.update(names)
        try:
            yield stream
        finally:
            self._client.wanted.subtract(names)
            self._client.remove_listener(stream.listener)

    async def send_fd(self, fd: int) -> str:
        """Give QEMU a copy of a file descriptor.

        :param fd: the descriptor; it stays the caller's to close.
        :returns: the name under which QEMU knows its copy, until a command takes it or it is closed.
        :raises QmpError: if QEMU does not take it.
        """
        name = f"fd{next(self._fd_names)}"
        await self._send(fd, "getfd", {"fdname": name})
        return name

    async def add_fd(self, fd: int, number: int) -> None:
        """Give QEMU a copy of a file descriptor to open as a file, until ``remove-fd``.

        :param fd: the descriptor; it stays the caller's to close.
        :param number: the file will be ``/dev/fdset/NUMBER``.
        :raises QmpError: if QEMU does not take it.
        """
        await self._send(fd, "add-fd", {"fdset-id": number})

    async def _send(self, fd: int, command: str, arguments: Mapping[str, object]) -> None:
        # QEMU keeps the last descriptor until a command takes it, so no other may be sent in between.
        async with self._fd_lock:
            try:
                self._client.send_fd_scm(fd)
            except (OSError, QMPError) as error:
                raise QmpError(f"qmp: {command}: {error}") from error
            await self.ask(dict, command, arguments)

    async def ask(
        self,
        kind: type[_T],
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = _COMMAND_TIMEOUT_S,
    ) -> _T:
        """Execute a command.

        :param kind: the type of its reply; ``dict`` if the command returns nothing.
        :param command: for example ``device_add``.
        :param arguments: its arguments, of the types that QEMU's schema gives them.
        :param timeout_s: how long QEMU may take, in seconds, after it has finished longer commands.
        :raises CommandRefusedError: if QEMU refuses it.
        :raises QmpError: if there is no answer, or one of another kind.
        """
        now_s = asyncio.get_running_loop().time()
        ends_s = max(now_s, self._busy_until_s) + timeout_s
        if timeout_s > _COMMAND_TIMEOUT_S:
            self._busy_until_s = ends_s
        try:
            async with asyncio.timeout_at(ends_s):
                reply: Any = await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise CommandRefusedError(f"qmp: {command}: {error}", kind=error.error_class) from error
        except TimeoutError:
            raise QmpError(f"qmp: {command}: no answer within {ends_s - now_s:.0f} s") from None
        except QMPError as error:
            raise QmpError(f"qmp: {command}: {error}") from error
        finally:
            if self._busy_until_s == ends_s:
                self._busy_until_s = 0.0
            if self._on_command is not None:
                self._on_command(command, asyncio.get_running_loop().time() - now_s)
        if not isinstance(reply, kind):
            raise QmpError(f"qmp: {command}: unexpected reply {reply!r}")
        return reply

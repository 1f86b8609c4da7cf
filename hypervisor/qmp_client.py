"""The library's QMP client, made safe against a guest that makes QEMU send endless events.

A guest's privileged user causes an event with a single write to a port (ACPI's ``_OST``, for example). QEMU
buffers unread events, so the client reads all of them at once and drops most before decoding.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter

from qemu.qmp import QMPClient
from qemu.qmp.message import Message

from hypervisor.allowance import Allowance
from hypervisor.override import override

IO_ERROR = "BLOCK_IO_ERROR"
SHUTDOWN, STOP = "SHUTDOWN", "STOP"
_LONGEST_LINE_BYTES = 4 << 20
"""Well above the longest reply, which lists 4096 processors."""
_EVENTS_AT_ONCE, _EVENTS_PER_S = 5000, 100
"""Far more than an honest guest causes: an event for each processor or memory module that is added or
removed, and a few a second that QEMU itself limits."""
_IO_ERRORS_AT_ONCE, _IO_ERRORS_PER_S = 100, 10
_LINES_IN_A_ROW = 100
"""How many lines are dropped before other tasks get their turn."""
_EVENT = re.compile(rb'\{"timestamp": \{[^{}]*\}, "event": "([A-Z0-9_]+)"')
"""The beginning of QEMU's lines with events. A line with another beginning is decoded to find out."""


class GuardedClient(QMPClient):
    """A client that decodes only the events that have a listener, and detects a flood of any.

    :param name: the virtual machine's name, for the library's log.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, readbuflen=_LONGEST_LINE_BYTES)
        self.wanted: Counter[str] = Counter((SHUTDOWN, STOP))
        """How many listeners there are for each event."""
        self.flooded: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Gets the name of the event that came too often; after it, only ``SHUTDOWN`` is passed on."""
        self._events = Allowance(burst=_EVENTS_AT_ONCE, per_s=_EVENTS_PER_S)
        self._io_errors = Allowance(burst=_IO_ERRORS_AT_ONCE, per_s=_IO_ERRORS_PER_S)

    @override
    async def _do_recv(self) -> Message:
        lines = 0
        while True:
            line = await self._readline()  # does not wait while lines are in the buffer
            begins = _EVENT.match(line)
            if begins is not None:
                name = begins[1].decode()
                message = Message(line, eager=True) if self._passes(name) else None
            else:
                message = Message(line, eager=True)
                if "event" in message and not self._passes(str(message["event"])):
                    message = None
            lines += 1
            if not lines % _LINES_IN_A_ROW:
                await asyncio.sleep(0)
            if message is not None:
                return message

    def _passes(self, name: str) -> bool:
        if name == IO_ERROR:
            # A broken disk is not the guest's fault, and one report of it is enough.
            return self._io_errors.take() and bool(self.wanted[name])
        if not self.flooded.done() and not self._events.take():
            self.flooded.set_result(name)
        return bool(self.wanted[name]) and (name == SHUTDOWN or not self.flooded.done())

"""The event that something was mounted or unmounted; see /proc/pid/mountinfo in proc(5)."""

from __future__ import annotations

import asyncio
import os
import select


class MountChanges:
    """Changes of the mounts of this process's namespace since this was made. To be made in an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        # The file is always readable. A change is an exceptional condition, for which asyncio has no call;
        # and a question clears it, so only the loop may ask.
        self._poll = select.epoll()
        self._poll.register(self._table, select.EPOLLPRI)
        self._loop.add_reader(self._poll.fileno(), self._changed.set)

    async def wait(self) -> None:
        """Wait for changes that were not reported yet."""
        await self._changed.wait()
        self._changed.clear()

    def close(self) -> None:
        """Close its descriptors."""
        self._loop.remove_reader(self._poll.fileno())
        self._poll.close()
        os.close(self._table)

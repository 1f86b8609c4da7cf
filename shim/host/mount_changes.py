"""The event of a mount or an unmount; see /proc/pid/mountinfo in proc(5)."""

from __future__ import annotations

import asyncio
import os
import select


class MountChanges:
    """Changes of this process's mounts since this object was made, which must happen in an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        # The file is always readable. A change is an exceptional condition, for which asyncio has no
        # function. A poll clears the condition, so only the loop may poll.
        self._poll = select.epoll()
        self._poll.register(self._table, select.EPOLLPRI)
        self._loop.add_reader(self._poll.fileno(), self._changed.set)

    async def wait(self) -> None:
        """Wait for changes that have not been reported yet."""
        await self._changed.wait()
        self._changed.clear()

    def close(self) -> None:
        """Close its descriptors."""
        self._loop.remove_reader(self._poll.fileno())
        self._poll.close()
        os.close(self._table)

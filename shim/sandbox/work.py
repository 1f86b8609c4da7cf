"""The tasks of a sandbox: its own work, and requests that must finish even if the caller goes away."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class Work:
    """The tasks of a sandbox.

    :param group: owns them.
    """

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._requests: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[object, object, None], *, name: str) -> asyncio.Task[None]:
        """Run a task that ends with the sandbox; its failure is logged and harms no other container."""

        async def contained() -> None:
            try:
                await work
            except Exception:
                log.exception("%s: unexpected failure", name)

        return self._group.create_task(contained(), name=name)

    def run(self, work: Coroutine[object, object, None], *, name: str) -> asyncio.Task[None]:
        """Run a task whose failure ends the shim."""
        return self._group.create_task(work, name=name)

    def finish(self, work: Coroutine[object, object, _T]) -> asyncio.Future[_T]:
        """Finish a request even if its caller goes away, because a half-done request could not be repeated.

        :returns: its outcome; cancelling the outcome does not cancel the work.
        """
        outcome: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        async def settled() -> None:
            try:
                result = await work
            except asyncio.CancelledError:
                outcome.cancel()  # the sandbox ends: release the caller
                raise
            except Exception as error:  # noqa: BLE001 - passed on to the caller
                if not outcome.done():
                    outcome.set_exception(error)
            else:
                if not outcome.done():
                    outcome.set_result(result)

        task = self._group.create_task(settled(), name="request")
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        return outcome

    def give_up(self) -> None:
        """Cancel what :meth:`finish` has not finished, because the sandbox ends."""
        for request in self._requests:
            request.cancel()

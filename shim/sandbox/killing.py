"""Kills processes in a guest, even if the guest does not obey.

A guest that cannot even kill a process is lost, so its machine is switched off. But a guest is slow on a busy
host, and a process that waits for the host's disk dies only when the disk has answered. So a machine that
other containers use gets more time: for them, its loss would be worse than the wait.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from shim.errors import DeadlineExceeded, FailedPrecondition, NotFound, ResourceExhausted
from shim.sandbox.process import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shim.sandbox.process import Process
    from shim.sandbox.sandbox import Sandbox

ALONE_TIMEOUT_S = 8.0  # for a killed process to be gone; a machine under emulation may be slow
SHARED_TIMEOUT_S = 60.0  # as above; below the two minutes that a kubelet waits for a killed container


async def kill(
    process: Process,
    *,
    container: str,
    number: int,
    everyone: bool,
    sandbox: Sandbox,
    is_shared: Callable[[], bool],
    wake: Callable[[], Awaitable[None]],
) -> None:
    """Send a signal to one process, or to all of its container.

    :param container: the container's id at the agent.
    :param number: the signal's number.
    :param sandbox: where the process runs.
    :param is_shared: tells whether the machine also serves other containers.
    :param wake: wakes the machine if it is parked.
    :raises NotFound: if the process has ended.
    :raises FailedPrecondition: if it is an exec that was never started.
    :raises ResourceExhausted: if the machine is parked and does not wake.
    :raises DeadlineExceeded: if the guest does not answer a signal other than SIGKILL.
    """
    if process.exited.is_set():
        raise NotFound(f"kill: {process}: process already finished: not found")
    if process.exec_id and process.state is State.CREATED:
        raise FailedPrecondition(f"kill: {process}: process not started")
    try:
        await wake()
    except ResourceExhausted as error:
        if number != signal.SIGKILL or is_shared():
            raise
        await sandbox.switch_off(f"SIGKILL of {process}, which is parked: {error}")
        return
    agent = await sandbox.agent()
    # With its own id, only init gets the signal; with an empty id, SIGKILL reaches all processes.
    target = "" if everyone and not process.exec_id else process.agent_id
    try:
        await agent.processes.signal(container, exec_id=target, signal=number)
    except DeadlineExceeded as error:
        if number != signal.SIGKILL:
            raise
        if not is_shared():
            await sandbox.switch_off(f"the guest did not answer SIGKILL of {process}: {error}")
    if number == signal.SIGKILL and not process.ended.is_set():
        sandbox.work.spawn(_see_it_end(process, sandbox, is_shared=is_shared()), name=f"kill {process}")


async def _see_it_end(process: Process, sandbox: Sandbox, *, is_shared: bool) -> None:
    """Switch the machine off if a process outlives SIGKILL, for example because it waits for a file."""
    timeout_s = SHARED_TIMEOUT_S if is_shared else ALONE_TIMEOUT_S
    try:
        async with asyncio.timeout(timeout_s):
            await process.ended.wait()
    except TimeoutError:
        await sandbox.switch_off(f"{process} outlived SIGKILL by {timeout_s:g} s")

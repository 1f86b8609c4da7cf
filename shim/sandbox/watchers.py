"""What a sandbox watches for as long as its machine runs: its network namespace, and kills for memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from shim.agent import guest_names
from shim.errors import ShimError
from shim.sandbox import task_events

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from google.protobuf.message import Message

    from shim.agent.client import Agent
    from shim.machine.machine import Machine
    from shim.sandbox.container import Container

log = logging.getLogger(__name__)


async def follow_network(machine: Machine, containers: Mapping[str, Container], *, sandbox_id: str) -> None:
    """Give the machine what comes to its network namespace later, as ``docker network connect`` does.

    :param machine: the sandbox's.
    :param containers: the sandbox's. When all have ended, what goes from the namespace goes because of that.
    :param sandbox_id: for the log.
    :raises ShimError: if there is no machine any more.
    """
    while True:
        await machine.network_changed()
        if all(one.init.exited.is_set() for one in containers.values()):
            continue
        try:
            await machine.follow_network()
        except ShimError as error:
            log.warning("network: sandbox %s: %s", sandbox_id, error)


async def report_ooms(
    agent: Agent, containers: Mapping[str, Container], publish: Callable[[str, Message], None]
) -> None:
    """Tell containerd of each container in which the guest's kernel killed for memory.

    :param agent: tells of them, until its machine is gone.
    :param containers: the sandbox's.
    :param publish: queues an event.
    """
    try:
        while True:
            container_id = guest_names.container_id(await agent.next_oom())
            if container_id in containers:
                publish(*task_events.out_of_memory(container_id))
    except ShimError as error:
        log.debug("out of memory: no more reports: %s", error)

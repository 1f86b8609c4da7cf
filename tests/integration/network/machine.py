"""A stand-in for a machine and its agent, and the network that it gets."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, cast

from hypervisor.errors import HotplugError
from shim.agent.oci_namespaces import WantedNamespace
from shim.errors import Internal
from shim.network.network import Network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hypervisor import Hypervisor, Nic
    from proto.kata import agent_pb2
    from shim.agent.client import Agent
    from shim.host.ledger import Ledger
    from tests.network_space import Space


class Machine:
    """A stand-in for the machine: it records calls, and refuses those that a test names."""

    def __init__(self) -> None:
        self.cards: dict[str, Nic] = {}
        self.queues: dict[str, list[int]] = {}
        self.told: list[Any] = []
        self.requests: list[agent_pb2.UpdateRoutesRequest] = []
        self.refuses = ""
        self.is_hako = False

    @property
    def vm(self) -> Hypervisor:
        return cast("Hypervisor", self)

    @property
    def agent(self) -> Agent:
        return cast("Agent", self)

    async def plug_nic(self, nic: Nic) -> str:
        if self.refuses == "plug":
            raise HotplugError("plug: no slot is free")
        self.cards[nic.id] = nic
        self.queues[nic.id] = [os.dup(descriptor) for descriptor in nic.tap_fds]
        return f"02/{len(self.cards):02x}"

    async def unplug(self, device_id: str, **_: float) -> None:
        del self.cards[device_id]
        for descriptor in self.queues.pop(device_id):
            os.close(descriptor)

    def die(self) -> None:
        for descriptors in self.queues.values():
            for descriptor in descriptors:
                os.close(descriptor)
        self.queues.clear()

    async def update_interface(self, interface: Any) -> None:
        if self.refuses == "interface":
            raise Internal("interface: Link not found")
        self.told.append(interface)

    async def update_routes(self, request: agent_pb2.UpdateRoutesRequest) -> list[str]:
        self.told.append(request.routes)
        self.requests.append(request)
        return []

    async def add_arp_neighbors(self, neighbors: Any) -> None:
        self.told.append(neighbors)

    def names(self) -> list[str]:
        return [message.name for message in self.told if hasattr(message, "devicePath")]


@contextlib.asynccontextmanager
async def network_of(pod: Space, ledger: Ledger, *, queues: int = 1) -> AsyncIterator[Network]:
    network = await Network.open(WantedNamespace(pod.path), ledger=ledger, queues=queues)
    try:
        yield network
    finally:
        await network.detach()


async def attach(network: Network, machine: Any) -> None:
    await network.prepare()
    await network.attach(vm=machine.vm, agent=machine.agent)

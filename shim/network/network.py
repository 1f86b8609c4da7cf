"""The network of one sandbox: every interface of its namespace becomes a card of its machine.

The namespace's side needs no machine, so it is done during the boot. The machine's side follows once the
agent answers. A step that fails undoes everything that it did.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self

from hypervisor import HypervisorError, Nic
from proto.kata import agent_pb2
from shim.errors import Internal, ShimError
from shim.host.ingress import remove_ingress
from shim.network import localhost, messages, resolver
from shim.network.changes import Changes
from shim.network.namespace import NetworkNamespace
from shim.network.plan import Neighbour, NetworkPlan
from shim.network.redirect import connect
from shim.network.scan import scan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from hypervisor import Hypervisor
    from shim.agent.client import Agent
    from shim.agent.oci_namespaces import WantedNamespace
    from shim.host.ledger import Ledger
    from shim.network.plan import Endpoint

log = logging.getLogger(__name__)

_UNKNOWN = NetworkPlan(rules=(), neighbours=(Neighbour(interface="", ip=""),), settings=(("", ""),))
"""The state after a failure, which no scan equals."""

UNPLUG_TIMEOUT_S = 5.0  # the guest answers within milliseconds, or never


@dataclass(slots=True, kw_only=True)
class _Connection:
    """An endpoint, its tap, and its card in the machine."""

    endpoint: Endpoint
    record: int | None
    connected: bool = False
    queues: tuple[int, ...] = ()
    pci_path: str = ""
    has_localhost: bool = False

    @property
    def device(self) -> str:
        return f"nic{self.endpoint.index}"

    def connect(self, *, queues: int) -> None:
        self.queues = connect(self.endpoint, queues=queues, has_localhost=self.has_localhost)
        self.connected = True

    def disconnect(self) -> None:
        if self.connected:
            remove_ingress(self.endpoint.index)
            self.connected = False

    def close_queues(self) -> None:
        """Close this process's descriptors; the tap stays if the machine has some."""
        for descriptor in self.queues:
            os.close(descriptor)
        self.queues = ()


class Network:
    """The network of one sandbox.

    :param namespace: the namespace whose interfaces the machine gets.
    :param ledger: where everything that must be undone is recorded.
    :param queues: how many packets each card can move at once: one for each processor of the machine.
    """

    def __init__(self, namespace: NetworkNamespace, *, ledger: Ledger, queues: int) -> None:
        self._namespace = namespace
        self._ledger = ledger
        self._queues = queues
        self._plan = NetworkPlan()
        self._warned: set[str] = set()
        self._connections: dict[int, _Connection] = {}
        self._lock = asyncio.Lock()
        self._forwarder: resolver.Forwarder | None = None
        self._changes: asyncio.Future[Changes] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, wanted: WantedNamespace, *, ledger: Ledger, queues: int) -> Self:
        """Open the wanted namespace, or make it; nothing in it is changed.

        :raises ShimError: if there is none, or it is the host's.
        """
        return cls(await NetworkNamespace.open(wanted), ledger=ledger, queues=queues)

    @property
    def namespace_path(self) -> Path:
        """The path at which the machine's process enters the namespace."""
        return self._namespace.path

    @property
    def endpoints(self) -> list[Endpoint]:
        """The interfaces that are connected to the machine."""
        return [each.endpoint for each in self._connections.values()]

    async def prepare(self) -> None:
        """Read the namespace and connect each interface to a tap; the machine may boot at the same time.

        :raises ShimError: if one cannot be connected; nothing is changed then.
        """
        async with self._lock:
            if self._namespace.wanted_path is None:  # no other process knows it yet
                return
            plan = await self._namespace.run(scan)
            await self._connect(plan.endpoints)
            self._plan = plan

    async def attach(self, *, vm: Hypervisor, agent: Agent) -> None:
        """Give the machine its cards, and the guest its addresses, routes and neighbours.

        :raises ShimError: if the machine or the guest refuses; then nothing is connected.
        """
        async with self._lock:
            if self._plan == NetworkPlan():
                return
            try:
                endpoints = [each.endpoint for each in self._connections.values()]
                await self._bring_up(endpoints, vm=vm, agent=agent)
                await self._configure(self._plan, former=NetworkPlan(), agent=agent)
            except BaseException:
                await self._remove(self._connections.values(), vm=vm)
                raise

    async def rescan(self, *, vm: Hypervisor, agent: Agent) -> None:
        """Let the machine follow changes in the namespace: interfaces that were added, removed or changed.

        :raises ShimError: if the machine cannot have a new interface, which then stays unconnected.
        """
        async with self._lock:
            if not self._changes.done():  # opened before the scan, so that no change is missed
                self._changes.set_result(await self._namespace.run(Changes))
            plan = await self._namespace.run(scan)
            if self._forwarder is not None:  # Docker may be down for a while
                plan = replace(plan, has_resolver=True)
            if plan == self._plan:
                return
            former = self._plan
            self._plan = replace(_UNKNOWN, loopback=former.loopback, loopback_mtu=former.loopback_mtu)
            known = {index: connection.endpoint for index, connection in self._connections.items()}
            same = {e.index for e in plan.endpoints if _is_same_card(e, known.get(e.index))}
            gone = [each for index, each in self._connections.items() if index not in same]
            await self._remove(gone, vm=vm)
            new = await self._connect(e for e in plan.endpoints if e.index not in same)
            if new:  # settings of an earlier card of the same name disappeared with it
                former = replace(former, settings=_UNKNOWN.settings)
            try:
                changed = [e for e in plan.endpoints if e != known.get(e.index)]
                await self._bring_up(changed, vm=vm, agent=agent)
                await self._configure(plan, former=former, agent=agent)
            except BaseException:
                await self._remove(new, vm=vm)
                raise
            self._plan = plan

    async def changed(self) -> None:
        """Wait until the namespace has changed since the first rescan, or since this method's last return."""
        changes = await asyncio.shield(self._changes)
        await changes.wait()

    async def detach(self) -> None:
        """Restore the namespace and leave it, after the end of the machine."""
        async with self._lock:
            await self._remove(self._connections.values(), vm=None)
            if self._forwarder is not None:
                self._forwarder.close()
                self._forwarder = None
            if self._changes.done():
                self._changes.result().close()
            self._namespace.close()

    async def _connect(self, endpoints: Iterable[Endpoint]) -> list[_Connection]:
        made: list[_Connection] = []
        path = self._namespace.wanted_path
        try:
            for endpoint in endpoints:
                # A namespace of the sandbox's own disappears with the sandbox.
                record = None
                if path is not None:
                    record = self._ledger.redirection(
                        str(path), namespace=self._namespace.number, interface=endpoint.index
                    )
                connection = _Connection(
                    endpoint=endpoint, record=record, has_localhost=self._way_to_localhost() is None
                )
                self._connections[endpoint.index] = connection
                made.append(connection)
                await self._namespace.run(partial(connection.connect, queues=self._queues))
        except BaseException:
            await self._remove(made, vm=None)  # none has a card yet
            raise
        return made

    async def _remove(self, connections: Iterable[_Connection], *, vm: Hypervisor | None) -> None:
        """Remove endpoints from the machine, if there is one, and restore them."""
        for connection in list(connections):
            if connection.pci_path and vm is not None:
                try:
                    await vm.unplug(connection.device, timeout_s=UNPLUG_TIMEOUT_S)
                except HypervisorError as error:  # disconnect it anyway
                    log.warning("network: %s: %s", connection.endpoint.name, error)
            connection.pci_path = ""
            try:
                await self._namespace.run(connection.disconnect)
            except (OSError, ShimError) as error:  # it stays in the ledger
                log.warning("network: %s: it stays redirected: %s", connection.endpoint.name, error)
            else:
                if connection.record is not None:
                    self._ledger.undone(connection.record)
            connection.close_queues()
            del self._connections[connection.endpoint.index]

    async def _bring_up(self, endpoints: Iterable[Endpoint], *, vm: Hypervisor, agent: Agent) -> None:
        """Plug the cards that the machine does not have yet, and let the guest set up each of them."""
        for endpoint in endpoints:
            connection = self._connections[endpoint.index]
            if not connection.pci_path:
                try:
                    connection.pci_path = await vm.plug_nic(
                        Nic(id=connection.device, mac=endpoint.mac, tap_fds=connection.queues)
                    )
                except HypervisorError as error:
                    raise Internal(f"network: {endpoint.name}: {error}") from error
                connection.close_queues()
            await agent.update_interface(messages.interface(endpoint, pci_path=connection.pci_path))
            connection.endpoint = endpoint

    async def _configure(self, plan: NetworkPlan, *, former: NetworkPlan, agent: Agent) -> None:
        """Let the guest set up everything except its cards.

        :param former: its previous state.
        """
        if not agent.is_hako:
            plan = messages.for_stock_agent(plan, former=former)
        self._warn(plan.unserved)
        if (plan.loopback, plan.loopback_mtu) != (former.loopback, former.loopback_mtu):
            await agent.update_interface(messages.loopback(plan.loopback, mtu=plan.loopback_mtu))
        routes, neighbours = list(plan.routes), list(plan.neighbours)
        leading = self._way_to_localhost()
        if (
            leading is not None and agent.is_hako
        ):  # a stock agent does not let its localhost answer over a link
            route, neighbour = localhost.way_to(localhost.HOST_SIDE, interface=leading.endpoint.name)
            routes.append(route)
            neighbours.append(neighbour)
            if plan.has_resolver:
                route, neighbour = localhost.way_to(localhost.RESOLVER, interface=leading.endpoint.name)
                routes.append(route)
                neighbours.append(neighbour)
                await self._forward()
        request = agent_pb2.UpdateRoutesRequest(routes=messages.routes(routes))
        if plan.rules != former.rules:
            request.rules.CopyFrom(messages.rules(plan.rules))
        if plan.settings != former.settings:
            request.settings.CopyFrom(messages.settings(plan.settings))
        self._warn(await agent.update_routes(request))
        if neighbours or former.neighbours:
            await agent.add_arp_neighbors(messages.neighbours(neighbours))

    def _warn(self, unserved: Iterable[str]) -> None:
        """Log once for each sandbox which parts of the namespace its guest cannot have."""
        for each in unserved:
            if each not in self._warned:
                self._warned.add(each)
                log.warning("network: %s", each)

    async def _forward(self) -> None:
        if self._forwarder is not None:
            return
        try:
            self._forwarder = await self._namespace.run(resolver.Forwarder)
        except OSError as error:
            log.warning("network: %s: %s: it will not be asked", localhost.RESOLVER, error.strerror)
        else:
            self._forwarder.start()

    def _way_to_localhost(self) -> _Connection | None:
        return next((each for each in self._connections.values() if each.has_localhost), None)


def _is_same_card(endpoint: Endpoint, known: Endpoint | None) -> bool:
    return known is not None and (endpoint.mac, endpoint.mtu) == (known.mac, known.mtu)

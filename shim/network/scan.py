"""Reads a network namespace: the parts that the guest gets, and those that it cannot have."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shim.errors import Internal
from shim.network import filters, resolver, rtnetlink, settings
from shim.network.decode import decode

if TYPE_CHECKING:
    from shim.network.plan import NetworkPlan

_LOOPBACK_MTU = 65536


def scan() -> NetworkPlan:
    """Read the calling thread's namespace.

    :raises InvalidArgument: if an interface is up that cannot be connected to a machine.
    :raises Internal: if the kernel refuses.
    """
    try:
        with rtnetlink.Netlink() as netlink:
            plan = decode(
                links=rtnetlink.links(netlink),
                addresses=rtnetlink.addresses(netlink),
                routes=rtnetlink.routes(netlink),
                neighbours=rtnetlink.neighbours(netlink),
                rules=rtnetlink.rules(netlink),
            )
        mtus = {endpoint.name: endpoint.mtu for endpoint in plan.endpoints}
        mtus[settings.LOOPBACK] = plan.loopback_mtu or _LOOPBACK_MTU
        return replace(
            plan,
            settings=settings.read(mtus),
            has_resolver=bool(plan.endpoints) and resolver.is_there(),
            unserved=(*plan.unserved, *(filters.find() if plan.endpoints else ())),
        )
    except OSError as error:
        raise Internal(f"network: reading the namespace: {error.strerror}; see dmesg") from error

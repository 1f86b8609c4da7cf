"""Redirects connections to localhost in the pod's namespace to localhost in the guest, for port forwarding.

containerd forwards a port by entering the pod's namespace and connecting to 127.0.0.1. Nothing listens there:
the pod's processes are in the guest. So the first tap gets a route to 127.0.0.1 with precedence over the
kernel's own, and an address for the answers, which the guest reaches over the link. Routes, address and
neighbour disappear with the tap. In IPv6, ::1 cannot leave a host.

The kernel does all of this: see route_localnet and accept_local in its ip-sysctl.rst, ip-route(8) and
tc-u32(8).
"""

from __future__ import annotations

import logging
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from shim.network.plan import Neighbour, NextHop, Route

if TYPE_CHECKING:
    from pyroute2 import IPRoute

    from shim.network.plan import Endpoint

log = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
RESOLVER = "127.0.0.11"
"""The address of Docker's resolver, see :mod:`shim.network.resolver`."""
# RFC 3927, 2.1: the last 256 addresses of the link-local range are never picked.
HOST_SIDE = "169.254.255.254"
HOST_SIDE_MAC = "02:68:61:6b:6f:01"
LAST_PRIORITY = 3
"""The priority of the filters here: they come before the one that redirects everything else."""

_INGRESS = 0xFFFF0000
_ETH_P_ALL = 0x0003
_ETH_P_8021Q = 0x8100
_ETH_P_8021AD = 0x88A8
_PASSED = 0x10001  # a class that does not exist: the packet goes up the namespace's stack as usual
_EVERYTHING = "0x0/0x0+0"
_IS_IPV4 = "0x40000000/0xf0000000+0"  # the IP version; other protocols have other bits there
_TO_HOST_SIDE = "0xa9fefffe/0xffffffff+16"
_TO_RESOLVER = "0x7f00000b/0xffffffff+16"
_TO_LOOPBACK = "0x7f000000/0xff000000+16"
_RTM_NEWROUTE = 24
_PREPEND = 0x1 | 0x4 | 0x400  # NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE: before the existing ones
_TABLE_LOCAL = 255
_SCOPE_LINK = 253


def lead_to_guest(netlink: IPRoute, *, endpoint: Endpoint, tap: int, tap_name: str) -> None:
    """Send packets for localhost, but no other local ones, from the calling thread's namespace to the guest.

    :param endpoint: the interface whose packets also go to the tap.
    :param tap: the index of the tap, which has an ingress queueing discipline but no filters yet.
    :raises NetlinkError: if the kernel refuses.
    """
    settings = Path("/proc/sys/net/ipv4/conf") / tap_name
    try:
        for setting in ("route_localnet", "accept_local"):
            (settings / setting).write_text("1", encoding="ascii")
    except OSError as error:
        log.warning("network: %s: %s: ports will not be forwarded", settings, error.strerror)
        return
    # The guest's localhost listens on this link, so only this host may reach it there. Packets from outside
    # go up the namespace's stack, which drops them as a kernel does. So do packets with a VLAN tag, because a
    # guest would look below tags without meaning, which a filter cannot.
    _pass(netlink, interface=endpoint.index, priority=1, keys=[_IS_IPV4, _TO_LOOPBACK])
    _pass(netlink, interface=endpoint.index, priority=2, protocol=_ETH_P_8021Q, keys=[_EVERYTHING])
    _pass(netlink, interface=endpoint.index, priority=3, protocol=_ETH_P_8021AD, keys=[_EVERYTHING])
    _pass(netlink, interface=tap, priority=1, keys=[_IS_IPV4, _TO_HOST_SIDE])
    _pass(netlink, interface=tap, priority=2, keys=[_IS_IPV4, _TO_RESOLVER])
    netlink.addr("add", index=tap, address=HOST_SIDE, prefixlen=32, scope=_SCOPE_LINK)
    netlink.neigh("add", dst=LOCALHOST, lladdr=endpoint.mac, ifindex=tap, state="permanent")
    netlink.route(
        (_RTM_NEWROUTE, _PREPEND),
        table=_TABLE_LOCAL,
        type="unicast",
        dst=f"{LOCALHOST}/32",
        oif=tap,
        prefsrc=HOST_SIDE,
        scope=_SCOPE_LINK,
    )


def way_to(address: str, *, interface: str) -> tuple[Route, Neighbour]:
    """Describe how the guest's localhost reaches an address of the namespace over a link.

    :param address: the host's side, to answer it; or the resolver, to ask it.
    :param interface: the name of the tap's endpoint.
    """
    route = Route(
        destination=ip_network(address),
        hops=(NextHop(interface=interface),),
        source=LOCALHOST,
        scope=_SCOPE_LINK,
    )
    return route, Neighbour(interface=interface, ip=address, mac=HOST_SIDE_MAC)


def _pass(
    netlink: IPRoute, *, interface: int, priority: int, keys: list[str], protocol: int = _ETH_P_ALL
) -> None:
    netlink.tc(
        "add-filter",
        "u32",
        index=interface,
        parent=_INGRESS,
        prio=priority,
        protocol=protocol,
        target=_PASSED,
        keys=keys,
    )

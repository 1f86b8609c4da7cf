"""Connects an interface of a namespace to a tap: every packet that arrives on one leaves by the other.

Traffic control does it in the kernel, with an ingress filter on each that matches everything, because a
bridge would need its own address and would learn, age and filter. All of this runs in a thread that is in the
namespace. pyroute2 is imported when there is an interface to work on: it costs every shim that has none 90 ms
and 12 MiB.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from shim.errors import FailedPrecondition, Internal
from shim.host.ingress import remove_ingress
from shim.network import localhost
from shim.network.decode import TAP_PREFIX
from shim.network.plan import Endpoint
from shim.network.tap import open_tap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyroute2 import IPRoute

_ETH_P_ALL = 3
_INGRESS = 0xFFFF0000
_EVERYTHING = "0x0/0x0+0"


def connect(endpoint: Endpoint, *, queues: int, has_localhost: bool = False) -> tuple[int, ...]:
    """Connect an interface to a new tap; the connection ends with :func:`remove_ingress` and the tap.

    :param queues: how many packets the tap can move at once.
    :param has_localhost: redirect connections to localhost in the namespace to the machine.
    :returns: the descriptors of the tap, one for each queue; the tap is gone when all are closed.
    :raises FailedPrecondition: if the interface is already connected; it is unchanged.
    :raises Internal: if the kernel refuses; the interface is unchanged.
    """
    try:
        return _connect(endpoint, queues=queues, has_localhost=has_localhost)
    except OSError as error:
        if error.errno in {errno.EBUSY, errno.EEXIST}:
            raise FailedPrecondition(
                f"network: {endpoint.name}: its incoming packets are redirected already, perhaps to another "
                "machine or by a filter (ingress or clsact); give each machine its own namespace"
            ) from error
        raise Internal(
            f"network: {endpoint.name}: connecting it to a machine: {error.strerror}; its kernel needs "
            "CONFIG_TUN, CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_U32 and CONFIG_NET_ACT_MIRRED"
        ) from error


def try_out() -> None:
    """Test a connection with a temporary interface in a temporary namespace.

    :raises Internal: if this host's kernel cannot.
    """
    name = "check"
    try:
        opened = open_tap(name, queues=1)
    except OSError as error:
        raise Internal(f"network: /dev/net/tun: {error.strerror}; load the kernel module tun") from error
    try:
        endpoint = Endpoint(
            index=socket.if_nametoindex(name), name=name, kind="tap", mac="", mtu=1500, arp=True, addresses=()
        )
        opened += connect(endpoint, queues=2)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _connect(endpoint: Endpoint, *, queues: int, has_localhost: bool) -> tuple[int, ...]:
    name = f"{TAP_PREFIX}{endpoint.index}"
    with _netlink() as netlink, contextlib.ExitStack() as undo:
        descriptors = open_tap(name, queues=queues)
        for descriptor in descriptors:
            undo.callback(os.close, descriptor)
        netlink.tc("add", "ingress", index=endpoint.index)
        undo.callback(remove_ingress, endpoint.index)
        tap = socket.if_nametoindex(name)
        # Without an address, the tap sends no packets of its own to the guest. Some hosts cannot
        # write here, and some have no IPv6: then the guest sees a few multicast packets that it ignores.
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1", encoding="ascii")
        netlink.link("set", index=tap, mtu=endpoint.mtu, address=localhost.HOST_SIDE_MAC, state="up")
        netlink.tc("add", "ingress", index=tap)
        if has_localhost:
            localhost.lead_to_guest(netlink, endpoint=endpoint, tap=tap, tap_name=name)
        _redirect(netlink, source=endpoint.index, target=tap)
        _redirect(netlink, source=tap, target=endpoint.index)
        undo.pop_all()
    return descriptors


def _redirect(netlink: IPRoute, *, source: int, target: int) -> None:
    netlink.tc(
        "add-filter",
        "u32",
        index=source,
        parent=_INGRESS,
        prio=localhost.LAST_PRIORITY + 1,
        protocol=_ETH_P_ALL,
        target=0,
        keys=[_EVERYTHING],
        action={"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target},
    )


@contextlib.contextmanager
def _netlink() -> Iterator[IPRoute]:
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415 - see above

    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error

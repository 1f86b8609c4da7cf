"""Finds software that handles packets in a namespace but never sees the guest's packets.

Traffic control redirects a packet to the tap before it reaches the namespace's own stack, so neither
netfilter nor IPVS nor IPsec sees it. Sources: linux/netfilter/nf_tables.h, linux/netfilter/x_tables.h,
linux/netfilter_ipv4/ip_tables.h, linux/xfrm.h, and /proc/net.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from shim.host import kernel
from shim.network.rtnetlink import Netlink, attributes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_NET = Path("/proc/thread-self/net")
_NETLINK_XFRM, _NETLINK_NETFILTER = 6, 12
_XFRM_MSG_GETPOLICY = 0x15
_XFRM_REQUEST = bytes(64)  # xfrm_userpolicy_id
_NFT_MSG_GETRULE = 10 << 8 | 7
_NFT_REQUEST = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
_NFT_MSG_GETCHAIN = 10 << 8 | 4
_NFT_HEADER_BYTES = 4
_NFTA_CHAIN_HOOK, _NFTA_CHAIN_POLICY = 4, 5
_DROPS = bytes(4)
_XT_GET_INFO, _XT_GET_ENTRIES = 64, 65
_XT_TABLE_BYTES = 32
_XT_INFO = struct.Struct("=32sI5I5III")
_XT_ENTRIES = struct.Struct("=32sI4x")
_XT_OFFSETS = struct.Struct("=HH")
_XT_TARGET = struct.Struct("=H29sB")
_XT_VERDICT = struct.Struct("=i")
_ACCEPT = -2
_ERROR = b"ERROR"
_IPVS_HEADER_LINES = 3
_DOCKERS_OWN = b"DOCKER_"
"""Docker's chains for its resolver, which the guest reaches in another way."""


def find() -> list[str]:
    """List the filters in the calling thread's namespace, one line each."""
    found = []
    if _has_nftables_rules():
        found.append("packet filter (nftables or iptables-nft)")
    found += [f"packet filter ({kind})" for kind in _legacy_tables()]
    if len(_lines("ip_vs")) > _IPVS_HEADER_LINES:
        found.append("load balancing (IPVS)")
    if _dump(_NETLINK_XFRM, _XFRM_MSG_GETPOLICY, _XFRM_REQUEST):
        found.append("IPsec policies (XFRM)")
    if len(_lines("ip_mr_vif")) > 1 or len(_lines("ip6_mr_vif")) > 1:
        found.append("multicast routing")
    return [
        f"packets of the guest pass by the namespace's {what}; set it up in a container with NET_ADMIN, or "
        "on the host outside the pod"
        for what in found
    ]


def _lines(name: str) -> list[str]:
    try:
        return (_NET / name).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # this kernel does not have it
        return []


def _dump(protocol: int, kind: int, request: bytes) -> list[bytes]:
    if protocol not in {int(line.split()[1]) for line in _lines("netlink")[1:]}:
        return []  # it is not in use, and a request would load its module
    try:
        with Netlink(protocol) as netlink:
            return netlink.dump(kind, request)
    except OSError:  # as above
        return []


def _has_nftables_rules() -> bool:
    rules = _dump(_NETLINK_NETFILTER, _NFT_MSG_GETRULE, _NFT_REQUEST)
    if any(_DOCKERS_OWN not in rule for rule in rules):
        return True
    chains = _dump(_NETLINK_NETFILTER, _NFT_MSG_GETCHAIN, _NFT_REQUEST)
    found = (dict(attributes(chain[_NFT_HEADER_BYTES:])) for chain in chains)
    return any(_NFTA_CHAIN_HOOK in one and one.get(_NFTA_CHAIN_POLICY) == _DROPS for one in found)


def _legacy_tables() -> Iterator[str]:
    for name, file, family, offsets_at in (
        ("iptables", "ip_tables_names", socket.AF_INET, 88),
        ("ip6tables", "ip6_tables_names", socket.AF_INET6, 140),
    ):
        if any(_has_legacy_rules(family, table, offsets_at=offsets_at) for table in _lines(file)):
            yield name
    if _lines("arp_tables_names"):
        yield "arptables"


def _has_legacy_rules(family: int, table: str, *, offsets_at: int) -> bool:
    level = socket.IPPROTO_IP if family == socket.AF_INET else socket.IPPROTO_IPV6
    named = table.encode().ljust(_XT_TABLE_BYTES, b"\0")
    try:
        with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as opened:

            def ask(option: int, request: bytes) -> bytes:
                return kernel.socket_option(opened.fileno(), level, option, request)

            _, hooks, *offsets, _, size = _XT_INFO.unpack(
                ask(_XT_GET_INFO, named.ljust(_XT_INFO.size, b"\0"))
            )
            request = _XT_ENTRIES.pack(named, size)
            entries = ask(_XT_GET_ENTRIES, request.ljust(len(request) + size, b"\0"))[len(request) :]
    except OSError:  # as above
        return False
    policies = {offset for hook, offset in enumerate(offsets[5:]) if hooks & 1 << hook}
    return has_rules(entries, policies=policies, offsets_at=offsets_at)


def has_rules(entries: bytes, *, policies: Collection[int], offsets_at: int) -> bool:
    """Tell whether a legacy table does anything but accept.

    Its own chains come first, each with its policy last; then those of users, each after an entry that names
    it.

    :param entries: the table.
    :param policies: where in it the policies are.
    :param offsets_at: where an entry says how large it is: in bytes, from its beginning.
    """
    verdicts: dict[int, int | None] = {}
    chains: dict[int, bytes] = {}
    position = 0
    while position + offsets_at + _XT_OFFSETS.size <= len(entries):
        target, size = _XT_OFFSETS.unpack_from(entries, position + offsets_at)
        if size <= target or position + size > len(entries):
            break
        start = position + target + _XT_TARGET.size
        _, name, _ = _XT_TARGET.unpack_from(entries, position + target)
        name = name.rstrip(b"\0")
        if name.startswith(_ERROR):
            chains[position + size] = entries[start : position + size].split(b"\0")[0]
        elif not chains:
            verdicts[position] = None if name else _XT_VERDICT.unpack_from(entries, start)[0]
        position += size
    return any(
        verdict != _ACCEPT if position in policies else not _is_dockers(verdict, chains)
        for position, verdict in verdicts.items()
    )


def _is_dockers(verdict: int | None, chains: Mapping[int, bytes]) -> bool:
    return verdict is not None and chains.get(verdict, b"").startswith(_DOCKERS_OWN)

"""The kernel parameters of a network namespace that differ from those of a new one.

A new namespace inherits IPv4's interface parameters from the host, but a machine does not. So these are
compared with the kernel's own defaults (ip-sysctl.rst, devconf_inherit_init_net), and all others with those
of a temporary namespace. For other inherited values, such as sizes of buffers and the congestion
control, the guest keeps its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from shim.host import kernel

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

LOOPBACK = "lo"

_ROOT = "/proc/sys"
_NETWORK = "net"
_LEFT_OUT = frozenset(
    {
        # Lists and counts.
        "nf_log",
        "nf_conntrack_count",
        # Duplicates of others, in other units or for all interfaces.
        "base_reachable_time",
        "retrans_time",
        "unres_qlen",
        "gc_min_interval",
        "ip_forward",
        # Derived from the size of the host's memory.
        "nf_conntrack_buckets",
    }
)
_OF_INTERFACES = frozenset({"net/ipv4/conf", "net/ipv6/conf", "net/ipv4/neigh", "net/ipv6/neigh"})
_IPV4_CONF, _IPV6_CONF = "net/ipv4/conf", "net/ipv6/conf"
_ALL, _DEFAULT = "all", "default"
_SPREADING = frozenset({"forwarding", "disable_ipv6"})
"""The parameters that the kernel copies to each interface when they are set for all."""
_IPV4_DEFAULTS = {
    "accept_redirects": "1",
    "accept_source_route": "1",
    "arp_evict_nocarrier": "1",
    "igmpv2_unsolicited_report_interval": "10000",
    "igmpv3_unsolicited_report_interval": "1000",
    "secure_redirects": "1",
    "send_redirects": "1",
    "shared_media": "1",
}
_IPV4_DEFAULTS_OF_ALL = _IPV4_DEFAULTS | {"accept_source_route": "0"}
_IPV4_DEFAULTS_OF_LOOPBACK = _IPV4_DEFAULTS | {"disable_policy": "1", "disable_xfrm": "1"}
_VALUE_BYTES = 4096
_OPENED = os.O_RDONLY | os.O_CLOEXEC


def read(mtus: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """Read the parameters that were changed in the calling thread's namespace.

    :param mtus: the MTU, in bytes, of each interface whose own parameters count.
    :returns: names, with slashes from ``net/`` on, and values, in the order in which they can be set.
    :raises OSError: if no namespace can be made for the comparison.
    """
    chosen = choose(_read({_ALL, _DEFAULT, *mtus}), first=_first(), mtus=mtus)
    return tuple((name, value) for name, value in chosen if _is_writable(name))


def choose(
    found: Mapping[str, str], *, first: Mapping[str, str], mtus: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Choose the parameters that differ from those of a new namespace.

    :param found: the parameters of the namespace.
    :param first: those of a new one.
    :param mtus: in bytes, of each interface.
    :returns: in the order in which they can be set.
    """
    chosen = {name: value for name, value in found.items() if value != _default(name, first)}
    for name, value in found.items():
        directory, interface, setting = _parts(name)
        if directory not in _OF_INTERFACES or interface == _ALL:
            continue
        general = _ALL if setting in _SPREADING else _DEFAULT
        implied = chosen.get(f"{directory}/{general}/{setting}")
        if directory == _IPV6_CONF and setting == "mtu" and value == str(mtus.get(interface)):
            chosen.pop(name, None)  # the link's own value
        elif implied == value and setting in _SPREADING:
            chosen.pop(name, None)
        elif implied is not None:
            # Interfaces that are added to the guest later begin with these values.
            chosen[name] = value
    return sorted(chosen.items(), key=lambda item: _order(item[0]))


def _parts(name: str) -> tuple[str, str, str]:
    directory, _, setting = name.rpartition("/")
    directory, _, interface = directory.rpartition("/")
    return directory, interface, setting


def _order(name: str) -> tuple[int, str]:
    _, interface, _ = _parts(name)
    return ({_ALL: 0, _DEFAULT: 1}.get(interface, 2), name)


def _default(name: str, first: Mapping[str, str]) -> str | None:
    directory, interface, setting = _parts(name)
    if directory == _IPV4_CONF:
        of_kind = {_ALL: _IPV4_DEFAULTS_OF_ALL, LOOPBACK: _IPV4_DEFAULTS_OF_LOOPBACK}
        return of_kind.get(interface, _IPV4_DEFAULTS).get(setting, "0")
    if directory in _OF_INTERFACES and name not in first:
        model = _DEFAULT if directory == _IPV6_CONF else LOOPBACK
        return first.get(f"{directory}/{model}/{setting}")
    return first.get(name)


@functools.cache
def _first() -> dict[str, str]:
    def make_and_read() -> dict[str, str]:
        kernel.enter_new_network_namespace()
        return _read({_ALL, _DEFAULT, LOOPBACK})

    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(make_and_read).result()


def _read(interfaces: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    descriptor = os.open(f"{_ROOT}/{_NETWORK}", _OPENED)
    try:
        _read_directory(_NETWORK, descriptor, interfaces=interfaces, found=found)
    finally:
        os.close(descriptor)
    return found


def _read_directory(
    directory: str, opened: int, *, interfaces: Collection[str], found: dict[str, str]
) -> None:
    for entry in os.listdir(opened):
        if entry in _LEFT_OUT or (directory in _OF_INTERFACES and entry not in interfaces):
            continue
        # It can only be written, has no value yet, or its interface is gone.
        with contextlib.suppress(OSError):
            # Walking with descriptors of directories takes two thirds of the time of whole paths.
            descriptor = os.open(entry, _OPENED, dir_fd=opened)
            try:
                value = os.read(descriptor, _VALUE_BYTES)
            except IsADirectoryError:
                _read_directory(f"{directory}/{entry}", descriptor, interfaces=interfaces, found=found)
            else:
                found[f"{directory}/{entry}"] = value.decode(errors="replace").strip()
            finally:
                os.close(descriptor)


def _is_writable(name: str) -> bool:
    try:
        return bool(os.stat(f"{_ROOT}/{name}").st_mode & 0o222)  # noqa: PTH116 - all paths here are strings
    except OSError:
        return False

"""Only a namespace's kernel parameters that were set on purpose are sent."""

from __future__ import annotations

from shim.network.settings import choose

FIRST = {
    "net/core/somaxconn": "4096",
    "net/ipv4/conf/all/forwarding": "1",  # inherited from the host, not the kernel's default
    "net/ipv4/conf/lo/disable_policy": "1",
    "net/ipv4/neigh/lo/gc_stale_time": "60",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/accept_ra": "1",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/default/mtu": "1280",
}
MTUS = {"lo": 65536, "eth0": 1400, "net1": 1400}


def chosen(**found: str) -> dict[str, str]:
    return dict(choose({f"net/{name}": value for name, value in found.items()}, first=FIRST, mtus=MTUS))


def test_the_initial_parameters_of_a_namespace_are_not_sent() -> None:
    found = {
        "core/somaxconn": "4096",
        "ipv4/conf/all/forwarding": "0",
        "ipv4/conf/all/accept_source_route": "0",
        "ipv4/conf/eth0/accept_source_route": "1",
        "ipv4/conf/eth0/send_redirects": "1",
        "ipv4/conf/lo/disable_policy": "1",
        "ipv4/neigh/eth0/gc_stale_time": "60",
        "ipv6/conf/eth0/accept_ra": "1",
        "ipv6/conf/eth0/mtu": "1400",
    }

    assert chosen(**found) == {}


def test_changed_parameters_are_sent() -> None:
    found = {
        "core/somaxconn": "99",
        "ipv4/conf/eth0/send_redirects": "0",
        "ipv4/conf/lo/disable_policy": "0",
        "ipv4/neigh/eth0/gc_stale_time": "77",
        "ipv6/conf/eth0/accept_ra": "0",
        "ipv6/conf/eth0/mtu": "1300",
        "netfilter/nf_conntrack_max": "1",  # a new namespace does not have it
    }

    assert chosen(**found) == {f"net/{name}": value for name, value in found.items()}


def test_parameters_that_a_namespace_inherits_from_the_host_are_sent() -> None:
    assert chosen(**{"ipv4/conf/all/forwarding": "1"}) == {"net/ipv4/conf/all/forwarding": "1"}


def test_a_value_for_all_is_repeated_only_for_interfaces_that_differ() -> None:
    found = {
        "ipv4/conf/all/forwarding": "1",
        "ipv4/conf/default/forwarding": "1",
        "ipv4/conf/eth0/forwarding": "1",
        "ipv4/conf/net1/forwarding": "0",
        "ipv6/conf/all/disable_ipv6": "1",
        "ipv6/conf/default/disable_ipv6": "0",
        "ipv6/conf/eth0/disable_ipv6": "1",
    }

    assert chosen(**found) == {
        "net/ipv4/conf/all/forwarding": "1",
        "net/ipv4/conf/net1/forwarding": "0",
        "net/ipv6/conf/all/disable_ipv6": "1",
        "net/ipv6/conf/default/disable_ipv6": "0",
    }


def test_an_interface_keeps_a_value_that_differs_from_the_default() -> None:
    found = {"ipv4/conf/default/rp_filter": "2", "ipv4/conf/eth0/rp_filter": "0"}

    assert chosen(**found) == {f"net/{name}": value for name, value in found.items()}


def test_parameters_for_all_interfaces_come_first_and_defaults_next() -> None:
    found = {
        "net/ipv4/conf/eth0/rp_filter": "1",
        "net/ipv4/conf/default/rp_filter": "2",
        "net/ipv4/conf/all/rp_filter": "1",
    }

    assert [name for name, _ in choose(found, first=FIRST, mtus=MTUS)] == [*reversed(found)]

"""A container's network is all of its namespace: routes, rules and parameters too, and as they change."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.life import until
from tests.network_space import Space, add_cable, new_space
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

# The image's own `ip` knows little: the host's is run in the container, with its libraries.
PROGRAMS = "type=bind,src=/usr,dst=/host,options=rbind:ro"
LIBRARIES = "/host/lib/x86_64-linux-gnu"
IP = f"{LIBRARIES}/ld-linux-x86-64.so.2 --library-path {LIBRARIES} /host/bin/ip -N"
#: How long the answer to a ping may take, in seconds; that no route leads to an address is known at once.
ANSWER_S = round(patient(30.0))
# Entries that a kernel makes for a link, and the route of forwarded ports to localhost.
NOBODYS = re.compile(
    r"hako\d|169\.254\.255\.254|fe80::|ff00::|^(anycast|broadcast) |valid_lft|link/|^\d+: \w+: <"
    r"|^local .* proto (kernel|2)"
)


@pytest.fixture
def outside() -> Iterator[Space]:
    with new_space() as space:
        yield space


@pytest.fixture
def pod(outside: Space) -> Iterator[Space]:
    """A namespace with two cables to the outside, where addresses behind them answer."""
    with new_space() as space:
        for number, name in ((1, "eth0"), (2, "net1")):
            add_cable(space, outside, name, number=number)
        for address in ("192.0.2.1/32", "192.0.2.2/32", "192.0.2.3/32", "198.51.100.1/32"):
            outside.ip(f"addr add {address} dev lo")
        for address in ("fd99::1/128", "fd99::2/128"):
            outside.ip(f"addr add {address} dev lo nodad")
        space.ip("route add default via 10.1.0.1")
        space.ip("-6 route add default via fd00:1::1")
        yield space


class Box:
    """A container in the namespace; with runc its programs see just that."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self._name = name

    def run(self, script: str) -> str:
        result = self._stack.containerd.exec(self._name, new_id(), "sh", "-c", script)
        assert result.code == 0, (script, result.stdout, result.stderr)
        return result.stdout

    def ask(self, script: str) -> str:
        """Run a script that only looks, and says something."""
        result = self._stack.containerd.ask(self._name, new_id(), "sh", "-c", script)
        assert result.code == 0, (script, result.stdout, result.stderr)
        return result.stdout

    def ip(self, *commands: str) -> list[list[str]]:
        """Run ``ip``, and read the entries that were not made by the kernel."""
        script = "; echo ==; ".join(f"{IP} {command}" for command in commands)
        return [_made(text) for text in self.ask(script).split("==\n")]

    def settings(self, *names: str) -> dict[str, str]:
        """Read kernel parameters."""
        script = "; ".join(f"echo {name} $(cat /proc/sys/net/{name})" for name in names)
        return dict(line.split(maxsplit=1) for line in self.ask(script).splitlines())

    def reached(self, *targets: str) -> set[str]:
        """Tell which of these addresses answer."""
        script = "; ".join(f"ping -c 1 -W {ANSWER_S} {one} >/dev/null 2>&1 && echo {one}" for one in targets)
        return set(self.ask(f"{script}; true").split())


def ip_in(space: Space, *commands: str) -> list[list[str]]:
    return [_made(space.ip(f"-N {command}")) for command in commands]


def _made(text: str) -> list[str]:
    lines = [re.sub(r"@\w+", "", " ".join(line.split())) for line in text.splitlines()]
    return [line for line in lines if not NOBODYS.search(line)]


@contextlib.contextmanager
def box_in(stack: Stack, pod: Space) -> Iterator[Box]:
    name = new_id()
    options = ["--detach", "--null-io", f"--with-ns=network:{pod.path}", f"--mount={PROGRAMS}"]
    started = stack.containerd.run(IMAGE, name, "sleep", "100000", options=options)
    try:
        assert started.code == 0, started.stderr
        yield Box(stack, name)
    finally:
        stack.containerd.remove(name)


def set_parameters(space: Space, values: dict[str, str]) -> None:
    """Set kernel parameters of a namespace."""

    def write() -> None:
        for name, value in values.items():
            (Path("/proc/sys/net") / name).write_text(value, encoding="ascii")

    space.inside(write)


def test_a_dropping_route_of_the_namespace_drops_in_the_container(either_stack: Stack, pod: Space) -> None:
    for kind, network in (
        ("blackhole", "192.0.2.1/32"),
        ("unreachable", "192.0.2.2/32"),
        ("prohibit", "192.0.2.3/32"),
        ("blackhole", "fd99::1/128"),
    ):
        pod.ip(f"route add {kind} {network}")
    targets = ("192.0.2.1", "192.0.2.2", "192.0.2.3", "198.51.100.1", "fd99::1", "fd99::2")
    with box_in(either_stack, pod) as box:
        assert box.reached(*targets) == {"198.51.100.1", "fd99::2"}
        errors = box.ask("for i in 1 2 3; do ping -c 1 -W 2 192.0.2.$i 2>&1 | grep -o 'sendto.*'; done; true")
        assert errors.splitlines() == [
            "sendto: Invalid argument",
            "sendto: No route to host",
            "sendto: Permission denied",
        ]
        pod.ip("route del blackhole 192.0.2.1/32")
        pod.ip("route add blackhole 198.51.100.0/24")
        until(
            lambda: box.reached("192.0.2.1", "198.51.100.1") == {"192.0.2.1"}, what="the routes have changed"
        )


def test_rules_and_other_tables_choose_the_way_as_they_do_in_the_namespace(
    either_stack: Stack, pod: Space
) -> None:
    pod.ip("route add blackhole default table 100")
    pod.ip("route add default via 10.2.0.1 table 1000")
    pod.ip("route add 10.1.0.0/24 dev eth0 table 1000")
    pod.ip("-6 route add blackhole default table 100")
    pod.ip("rule add from 10.2.0.2 lookup 1000 priority 50")
    pod.ip("rule add to 192.0.2.1 lookup 100 priority 60")
    pod.ip("rule add to 192.0.2.2 prohibit priority 61")
    pod.ip("rule add fwmark 0x7/0xff iif eth0 lookup 100 priority 62")
    pod.ip("rule add not to 192.0.2.0/24 lookup main suppress_prefixlength 0 priority 63")
    pod.ip("rule add uidrange 4000-4001 dport 53 unreachable priority 64")
    pod.ip("-6 rule add to fd99::1 lookup 100 priority 60")
    pod.ip("rule add priority 10 lookup local")
    pod.ip("rule del priority 0")
    targets = ("192.0.2.1", "192.0.2.2", "192.0.2.3", "fd99::1", "fd99::2")
    shown = ("-d rule", "-6 -d rule", "route show table 1000", "-6 route show table 100")
    with box_in(either_stack, pod) as box:
        assert box.ip(*shown) == ip_in(pod, *shown)
        assert "dev eth0" in box.ip("route get 192.0.2.3")[0][0]
        assert "via 10.2.0.1 dev net1" in box.ip("route get 192.0.2.3 from 10.2.0.2")[0][0]
        assert box.reached(*targets) == {"192.0.2.3", "fd99::2"}
        pod.ip("rule del priority 60")
        pod.ip("rule add to 192.0.2.3 blackhole priority 65")
        pod.ip("-6 route del blackhole default table 100")
        until(
            lambda: box.ip(*shown) == ip_in(pod, *shown),
            what="the rules have changed",
        )
        assert box.reached(*targets) == {"192.0.2.1", "fd99::1", "fd99::2"}


def test_addresses_are_those_of_the_namespace(either_stack: Stack, pod: Space, outside: Space) -> None:
    pod.ip("addr add 203.0.113.1/32 dev lo")
    pod.ip("addr add fd77::1/128 dev lo")
    pod.ip("route add local 203.0.113.128/25 dev lo")
    outside.ip("route add 203.0.113.0/24 via 10.1.0.2")
    outside.ip("route add fd77::/64 via fd00:1::2")
    pod.ip("addr add 10.1.0.77/24 dev eth0 label eth0:1 brd + noprefixroute")
    pod.ip("addr add 10.7.0.1 peer 10.7.0.2/32 dev eth0 scope link")
    pod.ip("addr add fd00:1::77/64 dev eth0 nodad preferred_lft 0")
    pod.ip("addr add fd07::1 peer fd07::2/128 dev eth0 nodad")
    pod.ip("addr add 10.8.0.1/24 dev eth0 metric 77")
    pod.ip("link set lo mtu 9000")
    shown = ("addr show dev eth0", "addr show dev lo", "route show table all", "-6 route show table all")
    with box_in(either_stack, pod) as box:
        assert box.ip(*shown) == ip_in(pod, *shown)
        assert "mtu 9000" in box.ask("ip link show dev lo")
        answering = {"203.0.113.1", "203.0.113.200", "fd77::1"}
        assert box.reached(*answering) == answering
        for address in answering:
            outside.run("busybox", "ping", "-c1", f"-W{ANSWER_S}", address)
        # A deprecated address is not chosen to speak from.
        assert "src fd00:1::77 " not in box.ip("-6 route get fd99::2")[0][0]
        pod.ip("addr add 203.0.113.2/32 dev lo")
        pod.ip("addr del 203.0.113.1/32 dev lo")
        pod.ip("addr del 10.7.0.1 peer 10.7.0.2/32 dev eth0")
        pod.ip("addr change 10.8.0.1/24 dev eth0 noprefixroute")
        until(lambda: box.ip(*shown) == ip_in(pod, *shown), what="the addresses have changed")


PARAMETERS = {
    "core/somaxconn": "99",
    "ipv4/conf/all/forwarding": "1",
    "ipv4/conf/all/arp_ignore": "1",
    "ipv4/conf/default/rp_filter": "2",
    "ipv4/conf/eth0/rp_filter": "1",
    "ipv4/conf/eth0/accept_local": "1",
    "ipv4/conf/lo/forwarding": "0",
    "ipv4/conf/net1/forwarding": "1",
    "ipv4/conf/net1/rp_filter": "0",
    "ipv4/ip_default_ttl": "33",
    "ipv4/ip_forward": "1",
    "ipv4/ip_local_port_range": "40000\t40999",
    "ipv4/ip_local_reserved_ports": "40100-40200",
    "ipv4/ip_nonlocal_bind": "1",
    "ipv4/ip_unprivileged_port_start": "80",
    "ipv4/neigh/eth0/gc_stale_time": "77",
    "ipv4/ping_group_range": "0\t100",
    "ipv4/tcp_fin_timeout": "33",
    "ipv4/tcp_keepalive_time": "600",
    "ipv4/tcp_rmem": "4096\t8192\t16384",
    "ipv4/tcp_syncookies": "2",
    "ipv6/bindv6only": "1",
    "ipv6/conf/all/forwarding": "1",
    "ipv6/conf/eth0/accept_ra": "0",
    "ipv6/conf/eth0/mtu": "1300",
    "ipv6/conf/net1/disable_ipv6": "1",
    "netfilter/nf_conntrack_tcp_timeout_established": "3600",
    "unix/max_dgram_qlen": "77",
}


def test_kernel_parameters_of_the_namespace_are_those_of_the_container(
    either_stack: Stack, pod: Space
) -> None:
    set_parameters(pod, PARAMETERS)
    with box_in(either_stack, pod) as box:
        assert box.settings(*PARAMETERS) == {
            name: " ".join(value.split()) for name, value in PARAMETERS.items()
        }
        set_parameters(pod, {"ipv4/conf/eth0/rp_filter": "0", "ipv4/conf/net1/forwarding": "0"})
        changed = ("ipv4/conf/eth0/rp_filter", "ipv4/conf/net1/forwarding", "core/somaxconn")
        until(
            lambda: list(box.settings(*changed).values()) == ["0", "0", "99"],
            what="the parameters have changed",
        )


def test_a_namespace_that_has_nothing_but_its_loopback_counts_too(either_stack: Stack) -> None:
    with new_space() as pod:
        pod.ip("addr add 203.0.113.1/32 dev lo")
        pod.ip("route add blackhole 10.0.0.0/8")
        pod.ip("rule add to 11.0.0.0/8 prohibit")
        set_parameters(pod, {"core/somaxconn": "99"})
        shown = ("addr show dev lo", "route show table all", "rule")
        with box_in(either_stack, pod) as box:
            assert box.ip(*shown) == ip_in(pod, *shown)
            assert box.reached("203.0.113.1") == {"203.0.113.1"}
            assert box.settings("core/somaxconn") == {"core/somaxconn": "99"}


def test_attributes_of_a_route_or_neighbour_hold_in_the_container(
    either_stack: Stack, pod: Space, outside: Space
) -> None:
    pod.ip("route add 192.0.2.1 via 10.2.0.1 src 10.1.0.2 metric 5 mtu lock 1300 advmss 900 initcwnd 20")
    pod.ip("route add 192.0.2.2 via 203.0.113.9 dev eth0 onlink proto bird")
    pod.ip("route add 192.0.2.3 tos 0x10 via 10.2.0.1 quickack 1 hoplimit 9")
    pod.ip("route add 198.51.100.0/24 nexthop via 10.1.0.1 weight 3 nexthop via 10.2.0.1 weight 1")
    pod.ip("-6 route add fd99::1 via fd00:2::1 pref high metric 5 mtu 1300")
    pod.ip("neigh add 10.1.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")
    pod.ip("neigh add fd00:1::9 lladdr 02:00:00:00:00:0a dev eth0 nud permanent")
    pod.ip("neigh add proxy 10.1.0.50 dev eth0")
    shown = ("route", "-6 route", "neigh show nud permanent", "neigh show proxy")
    with box_in(either_stack, pod) as box:
        assert box.ip(*shown) == ip_in(pod, *shown)
        assert "via 10.2.0.1 dev net1" in box.ip("route get 192.0.2.3 tos 0x10")[0][0]
        pod.ip("route change 192.0.2.1 via 10.2.0.1 metric 5 advmss 800")
        pod.ip("route del 192.0.2.3 tos 0x10")
        pod.ip("neigh del 10.1.0.9 dev eth0")
        pod.ip("neigh add proxy 10.1.0.51 dev eth0")
        pod.ip("neigh del proxy 10.1.0.50 dev eth0")
        until(lambda: box.ip(*shown) == ip_in(pod, *shown), what="the routes have changed")


def test_a_network_as_plugins_make_it_works(either_stack: Stack, outside: Space) -> None:
    """Each interface as another plugin leaves it: all of them in one namespace."""
    with new_space() as pod:
        for name, mtu in (
            ("calico", 1500),
            ("ptp", 1500),
            ("jumbo", 9000),
            ("small", 1280),
            ("static", 1500),
        ):
            pod.ip(f"link add {name} mtu {mtu} type veth peer name {name} mtu {mtu} netns {outside.pid}")
        outside.ip("link add below type veth peer name far")
        outside.ip("link set below up")
        outside.ip(f"link add link below name macvlan netns {pod.pid} type macvlan mode bridge")
        for space in (pod, outside):
            # No neighbour is asked for an address there.
            space.ip("link set static arp off")
            for name in ("calico", "ptp", "jumbo", "small", "static"):
                space.ip(f"link set {name} up")
        outside.ip("link set far up")
        pod.ip("link set macvlan up")
        set_parameters(outside, {"ipv4/conf/calico/proxy_arp": "1", "ipv4/neigh/calico/proxy_delay": "0"})
        set_parameters(outside, {"ipv4/conf/calico/forwarding": "1"})
        outside.ip("addr add 192.0.2.1/32 dev lo")
        outside.ip("addr add fd99::1/128 dev lo nodad")
        outside.ip("route add default dev lo")
        outside.ip("route add 10.1.0.2 dev calico")
        pod.ip("addr add 10.1.0.2/32 dev calico")
        pod.ip("route add default via 169.254.1.1 dev calico onlink src 10.1.0.2 mtu 1450")
        outside.ip("addr add 10.2.0.1 peer 10.2.0.2/32 dev ptp")
        pod.ip("addr add 10.2.0.2 peer 10.2.0.1/32 dev ptp")
        for number, name in ((3, "jumbo"), (5, "static"), (6, "macvlan")):
            pod.ip(f"addr add 10.{number}.0.2/24 dev {name}")
            outside.ip(f"addr add 10.{number}.0.1/24 dev {'far' if name == 'macvlan' else name}")
        for one, other, other_end in ((pod, outside, "10.5.0.1"), (outside, pod, "10.5.0.2")):
            [mac] = re.findall(r"link/ether (\S+)", other.ip("link show static"))
            one.ip(f"neigh add {other_end} lladdr {mac} dev static nud permanent")
        outside.ip("addr add fe80::1/64 dev small nodad")
        outside.ip("-6 route add fd04::2 dev small")
        pod.ip("addr add fd04::2/128 dev small nodad")
        pod.ip("-6 route add default via fe80::1 dev small")
        shaper = "tc qdisc add dev ptp root tbf rate 100mbit burst 32k latency 400ms"
        pod.run(*shaper.split())
        with box_in(either_stack, pod) as box:
            far = ("192.0.2.1", "10.2.0.1", "10.3.0.1", "10.5.0.1", "10.6.0.1", "fd99::1")
            assert box.reached(*far) == {*far}
            assert box.reached("10.3.0.1 -s 8900", "fd99::1 -s 2000") >= {"10.3.0.1", "fd99::1"}
            for near in ("10.1.0.2", "10.2.0.2", "10.3.0.2", "10.5.0.2", "10.6.0.2", "fd04::2"):
                outside.run("busybox", "ping", "-c1", f"-W{ANSWER_S}", near)


@pytest.mark.hako
def test_a_packet_filter_in_the_namespace_is_named_in_the_log_once(one_stack: Stack, pod: Space) -> None:
    pod.run("iptables", "-A", "INPUT", "-p", "tcp", "--dport", "9", "-j", "DROP")
    log = one_stack.containerd.log
    before = log.stat().st_size
    said = "pass by the namespace's packet filter"

    def warned() -> list[str]:
        with log.open(encoding="utf-8", errors="replace") as lines:
            lines.seek(before)
            return [line for line in lines if said in line]

    with box_in(one_stack, pod) as box:
        until(warned, what="containerd has copied the warning to its log")
        pod.ip("addr add 10.1.0.9/32 dev eth0")
        until(lambda: "10.1.0.9/32" in box.ask("ip addr show"), what="the address is there")
    [warning] = warned()
    assert "set it up in a container with NET_ADMIN" in warning


@pytest.mark.inherent("sockets-of-namespace")
def test_the_sockets_of_a_container_are_listed_in_its_namespace_on_the_host(
    either_stack: Stack, pod: Space
) -> None:
    with box_in(either_stack, pod) as box:
        box.run("nc -ll -p 7000 -e cat </dev/null >/dev/null 2>&1 &")
        until(lambda: ":1B58" in box.ask("cat /proc/net/tcp6"), what="the server listens")
        assert ":1B58" in pod.run("cat", "/proc/net/tcp6")

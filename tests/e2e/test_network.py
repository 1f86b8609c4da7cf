"""Containers reach the networks of their namespace's interfaces, and are reached from there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import struct
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.host.ledger import SHIM_PROCESS, Ledger
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.life import until
from tests.e2e.tasks import Tasks
from tests.network_space import Space, add_cable, new_space
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

HOST = f"/proc/{os.getpid()}/ns/net"
DEADLINE_S = patient(60.0)
PORT = 7000
RESOLVER = "127.0.0.11"
DNS_HEADER_BYTES = 12
TRANSFER_BYTES = 4 << 20


@pytest.fixture
def outside() -> Iterator[Space]:
    with new_space() as space:
        yield space


@pytest.fixture
def pod() -> Iterator[Space]:
    with new_space() as space:
        yield space


@contextlib.contextmanager
def box_in(stack: Stack, pod: Space) -> Iterator[str]:
    """A container in the pod's network that answers with the SHA-256 of its input."""
    name = new_id()
    options = ["--detach", "--null-io", f"--with-ns=network:{pod.path}"]
    command = ["nc", "-ll", "-p", str(PORT), "-e", "sha256sum"]
    started = stack.containerd.run(IMAGE, name, *command, options=options)
    try:
        assert started.code == 0, started.stderr
        yield name
    finally:
        stack.containerd.remove(name)


def shell(stack: Stack, name: str, script: str, **more: str) -> str:
    result = stack.containerd.exec(name, new_id(), "sh", "-c", script, **more)
    assert result.code == 0, (script, result.stdout, result.stderr)
    return result.stdout


def answers(stack: Stack, name: str, address: str) -> bool:
    """Tell whether an address answers a container."""
    return stack.containerd.exec(name, new_id(), "ping", "-c", "1", "-W", "30", address).code == 0


@contextlib.contextmanager
def digesting_server(space: Space, family: int, address: str) -> Iterator[None]:
    """Answer each connection with the SHA-256 of all that came, once its sender has finished."""

    def listen() -> socket.socket:
        return socket.create_server((address, PORT), family=family)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    digest = hashlib.sha256()
                    while data := connection.recv(1 << 20):
                        digest.update(data)
                    connection.sendall(digest.hexdigest().encode())

    server = space.inside(listen)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(DEADLINE_S)


def exchange(space: Space, family: int, address: str, data: bytes) -> bytes:
    """Send data from a namespace to the server in the container, and return its answer."""
    with space.inside(lambda: socket.socket(family)) as opened:
        opened.settimeout(DEADLINE_S)
        opened.connect((address, PORT))
        opened.sendall(data)
        opened.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: opened.recv(1 << 20), b""))


def test_a_container_has_the_network_of_its_namespace(one_stack: Stack, pod: Space, outside: Space) -> None:
    add_cable(pod, outside, "eth0", number=1, mtu=1400)
    add_cable(pod, outside, "net1", number=2, mtu=9000)
    outside.ip("addr add 192.0.2.1/32 dev lo")
    outside.ip("addr add fd99::1/128 dev lo nodad")
    outside.ip("link set eth0 addrgenmode eui64")
    pod.ip("route add default via 10.1.0.1 metric 7")
    pod.ip("route add default via 10.2.0.1 metric 9")
    pod.ip("-6 route add default via fe80::ff dev eth0")
    pod.ip("route add 198.51.100.0/24 nexthop via 10.1.0.1 weight 3 nexthop via 10.2.0.1")
    pod.ip("route add 203.0.113.0/24 via 169.254.1.1 dev eth0 onlink mtu 1300")
    outside.ip("addr add fe80::ff/64 dev eth0 nodad")
    lladdr = "02:00:00:00:00:99"
    pod.ip(f"neigh add 10.1.0.77 lladdr {lladdr} dev eth0 nud permanent")
    before = pod.configuration()
    with box_in(one_stack, pod) as name:
        # One process for all of it: each costs a second where machines are emulated.
        commands = ("ip link", "ip addr show dev eth0", "ip route", "ip -6 route", "ip neigh")
        seen = shell(one_stack, name, "; echo ==; ".join(commands)).split("==\n")
        links, addresses, routes, routes6, neighbours = seen
        for interface, mtu in (("eth0", 1400), ("net1", 9000)):
            [mac] = re.findall(rf"{interface}@.*\n +link/ether (\S+)", pod.ip("link"))
            assert re.search(rf"{interface}: .*UP.* mtu {mtu} .*\n +link/ether {mac} ", links), links
        assert {"10.1.0.2/24", "fd00:1::2/64"} <= set(re.findall(r"inet6? (\S+)", addresses))
        assert {
            "default via 10.1.0.1 dev eth0 metric 7",
            "default via 10.2.0.1 dev net1 metric 9",
            "10.1.0.0/24 dev eth0 scope link src 10.1.0.2",
        } <= {" ".join(line.split()) for line in routes.splitlines()}
        assert "203.0.113.0/24 via 169.254.1.1 dev eth0 onlink" in " ".join(routes.split())
        assert "default via fe80::ff dev eth0" in routes6
        assert lladdr in neighbours

        targets = ("10.1.0.1", "192.0.2.1", "10.2.0.1", "fd00:1::1", "fd99::1")
        shell(one_stack, name, " && ".join(f"ping -c 1 -W 30 {target}" for target in targets))
        for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "fd99::1")):
            with digesting_server(outside, family, address):
                script = (
                    f"dd if=/dev/zero bs=1M count={TRANSFER_BYTES >> 20} 2>/dev/null | nc {address} {PORT}"
                )
                digest = hashlib.sha256(bytes(TRANSFER_BYTES)).hexdigest()
                assert shell(one_stack, name, script) == digest

        data = os.urandom(1 << 20)
        for family, address in ((socket.AF_INET, "10.1.0.2"), (socket.AF_INET6, "fd00:1::2")):
            came = exchange(outside, family, address, data)
            assert came.split()[0] == hashlib.sha256(data).hexdigest().encode()
        # As containerd forwards a port.
        assert (
            exchange(pod, socket.AF_INET, "127.0.0.1", b"x").split()[0]
            == hashlib.sha256(b"x").hexdigest().encode()
        )
    until(lambda: pod.configuration() == before, what="the namespace is as it was")


def test_an_interface_that_is_put_next_to_the_task_before_its_start_is_there(
    one_stack: Stack, outside: Space
) -> None:
    """As ``ctr run --cni`` and nerdctl do it."""
    daemon, name = one_stack.containerd, new_id()
    created = daemon.ctr("containers", "create", "--runtime", daemon.runtime, IMAGE, name, "sleep", "100000")
    assert created.code == 0, created.stderr
    with Tasks(daemon.address) as tasks:
        try:
            pid = tasks.begin_create(name).result().pid
            own = Space(Path(f"/proc/{pid}/ns/net"), pid=pid)
            assert own.path.stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
            add_cable(own, outside, "eth0", number=1)
            tasks.call("Start", name)
            shell(one_stack, name, "ping -c 1 -W 30 10.1.0.1 && ping -c 1 -W 30 fd00:1::1")
        finally:
            daemon.remove(name)


def test_an_interface_that_comes_to_a_running_container_is_there_until_it_goes(
    one_stack: Stack, pod: Space, outside: Space
) -> None:
    """As `docker network connect` and `disconnect` do it."""
    with box_in(one_stack, pod) as name:
        cards = "ls /sys/class/net"
        assert shell(one_stack, name, cards).split() == ["lo"]
        add_cable(pod, outside, "eth1", number=1)
        until(lambda: "10.1.0.2/24" in shell(one_stack, name, "ip addr show"), what="the address is there")
        # Its address is there some time before the link is up and the route to the network is set.
        until(partial(answers, one_stack, name, "10.1.0.1"), what="the outside answers")
        pod.ip("link delete eth1")
        until(lambda: shell(one_stack, name, cards).split() == ["lo"], what="the interface is gone")


@contextlib.contextmanager
def resolver(space: Space, address: str) -> Iterator[None]:
    """Answer every question for the address of a name as Docker does: on a loopback address, redirected."""

    def listen() -> tuple[socket.socket, socket.socket]:
        known_by = socket.create_server((RESOLVER, 0))
        answering = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        answering.bind(known_by.getsockname())
        return known_by, answering

    def answer() -> None:
        while question := (received := answering.recvfrom(512))[0]:
            kind = question[question.index(b"\0", DNS_HEADER_BYTES) + 1 :][:2]
            found = kind == b"\0\1"
            flags_and_counts = struct.pack("!5H", 0x8180, 1, found, 0, 0)
            # A pointer to the name that was asked for, and an address to be forgotten at once.
            record = b"\xc0\x0c" + struct.pack("!2HLH", 1, 1, 0, 4) + socket.inet_aton(address)
            body = question[DNS_HEADER_BYTES:] + (record if found else b"")
            answering.sendto(question[:2] + flags_and_counts + body, received[1])

    known_by, answering = space.inside(listen)
    with known_by, answering:
        port = known_by.getsockname()[1]
        rule = f"OUTPUT -d {RESOLVER} -p udp --dport 53 -j DNAT --to {RESOLVER}:{port}".split()
        space.run("iptables", "-t", "nat", "-A", *rule)
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            answering.sendto(b"", answering.getsockname())
            thread.join()
            space.run("iptables", "-t", "nat", "-D", *rule)


def test_the_resolver_that_docker_has_on_a_loopback_address_answers_the_guest(
    one_stack: Stack, pod: Space, outside: Space
) -> None:
    add_cable(pod, outside, "eth0", number=1)
    with contextlib.ExitStack() as later:
        with resolver(pod, "10.1.0.77"):
            name = later.enter_context(box_in(one_stack, pod))
            for asked in ("one.example", "two.example"):
                assert "10.1.0.77" in shell(one_stack, name, f"nslookup {asked} {RESOLVER}")
        with resolver(pod, "10.1.0.78"):  # on another port, as after a restart of dockerd
            assert "10.1.0.78" in shell(one_stack, name, f"nslookup three.example {RESOLVER}")
        # Other addresses of the loopback network belong to the guest.
        assert "127.0.0.12" in shell(one_stack, name, "ip route get 127.0.0.12")
        shell(one_stack, name, "ping -c 1 -W 30 127.0.0.12")


def test_an_impossible_device_is_refused_in_one_line_and_leaves_nothing(
    one_stack: Stack, pod: Space, outside: Space
) -> None:
    pod.ip("link add br0 type bridge")
    pod.ip("link set br0 up")
    add_cable(pod, outside, "eth0", number=1)
    for namespace, reason in (
        (pod.path, "network: br0: a bridge cannot be connected to a machine"),
        (HOST, f"network: namespace {HOST}: it is the host's own"),
        (f"{HOST}x", f"network: namespace {HOST}x: No such file or directory"),
    ):
        name = new_id()
        options = ["--rm", f"--with-ns=network:{namespace}"]
        result = one_stack.containerd.run(IMAGE, name, "true", options=options)
        if result.code == 0 or name in one_stack.containerd.containers():
            one_stack.containerd.remove(name)
        assert (result.code, len(result.stderr.strip().splitlines())) == (1, 1), result.stderr
        assert reason in result.stderr
    assert "ingress" not in pod.run("tc", "qdisc")


def test_a_killed_shim_leaves_the_namespace_as_it_was(one_stack: Stack, pod: Space, outside: Space) -> None:
    add_cable(pod, outside, "eth0", number=1)
    before = pod.configuration()
    with box_in(one_stack, pod) as name:
        assert pod.configuration() != before
        ledger = Ledger(one_stack.record(name).state_directory)
        [shim] = [each.pid for each in ledger.entries() if each.name == SHIM_PROCESS]
        ledger.close()
        os.kill(shim, signal.SIGKILL)
        one_stack.containerd.wait_for_state(name, "GONE")
    # containerd may forget the task while its `delete` still runs.
    until(lambda: pod.configuration() == before, what="the namespace is as it was")

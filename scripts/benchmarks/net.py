"""Measures a pod's network: to its host, from it, and to another pod."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks import bare, load
from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.worker import Worker, in_container
from tests.network_space import Space, add_cable, new_space

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.benchmarks.stage import Stage

MIB = 1 << 20
SIZE_MIB = 64
DATAGRAMS = 16_000
TRIPS = 1000


def net_tcp_out(stage: Stage) -> Samples:
    """Send 64 MiB over TCP from a container to its host, as MiB/s; higher is better.

    The pod has a veth cable to the host and packets of 1400 bytes, as with a CNI plugin.
    Baseline: the same program in a bare QEMU of the same size, with virtio-net on a tap of the host.
    """
    return _to_host(stage, "tcp_out", SIZE_MIB * MIB, SIZE_MIB)


def net_tcp_in(stage: Stage) -> Samples:
    """Send 64 MiB over TCP from the host to a container; otherwise as net_tcp_out."""
    return _to_host(stage, "tcp_in", SIZE_MIB * MIB, SIZE_MIB)


def net_tcp_pods(stage: Stage) -> Samples:
    """Send 64 MiB over TCP from a container to one in another pod; otherwise as net_tcp_out.

    The host routes between the two, as it does between the bare machines.
    """
    return _to_pod(stage, "tcp_out", SIZE_MIB * MIB, SIZE_MIB)


def net_tcp_trips(stage: Stage) -> Samples:
    """Send a byte over TCP from a container to its host and back, as trips/s; higher is better.

    Otherwise as net_tcp_out.
    """
    return _to_host(stage, "tcp_trips", TRIPS, TRIPS)


def net_udp_out(stage: Stage) -> Samples:
    """Send 16,000 datagrams of 1372 bytes from a container to its host, as datagrams/s; higher is better.

    None is lost: after each 32, the sender waits for a word from the receiver. Otherwise as net_tcp_out.
    """
    return _to_host(stage, "udp_out", DATAGRAMS, DATAGRAMS)


def net_udp_in(stage: Stage) -> Samples:
    """Send 16,000 datagrams of 1372 bytes from the host to a container; otherwise as net_udp_out."""
    return _to_host(stage, "udp_in", DATAGRAMS, DATAGRAMS)


def net_udp_pods(stage: Stage) -> Samples:
    """Send 16,000 datagrams from a container to one in another pod; otherwise as net_udp_out."""
    return _to_pod(stage, "udp_out", DATAGRAMS, DATAGRAMS)


def net_udp_trips(stage: Stage) -> Samples:
    """Send a datagram from a container to its host and back, as trips/s; higher is better.

    Otherwise as net_tcp_out.
    """
    return _to_host(stage, "udp_trips", TRIPS, TRIPS)


def _to_host(stage: Stage, work: str, order: int, amount: int) -> Samples:
    of = bare.spec(stage, template=False)
    with new_space() as host, contextlib.ExitStack() as stack:
        stack.enter_context(_server(host))
        pod = stack.enter_context(_pod(stage, host, 1))
        machine = stack.enter_context(bare.running(stage, of, card=_card(host, 3)))
        samples = alternate(
            stage.rounds,
            value=lambda: amount / pod.ask(work, "10.1.0.1", order),
            baseline=lambda: amount / machine.ask(work, "10.3.0.1", order),
        )
    stage.wait_until_gone()
    return samples


def _to_pod(stage: Stage, work: str, order: int, amount: int) -> Samples:
    of = bare.spec(stage, template=False)
    with new_space() as host, contextlib.ExitStack() as stack:
        host.inside(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii"))
        stack.enter_context(_pod(stage, host, 1, serves=True))
        pod = stack.enter_context(_pod(stage, host, 2))
        stack.enter_context(bare.running(stage, of, card=_card(host, 3), serves=True))
        machine = stack.enter_context(bare.running(stage, of, card=_card(host, 4)))
        samples = alternate(
            stage.rounds,
            value=lambda: amount / pod.ask(work, "10.1.0.2", order),
            baseline=lambda: amount / machine.ask(work, "10.3.0.2", order),
        )
    stage.wait_until_gone()
    return samples


def _server(host: Space) -> Worker:
    argv = ["nsenter", f"--net={host.path}", sys.executable, "-ISB", load.__file__, load.SERVE]
    return Worker("the other end on the host", argv)


@contextlib.contextmanager
def _pod(stage: Stage, host: Space, number: int, *, serves: bool = False) -> Iterator[Worker]:
    with new_space() as space:
        add_cable(space, host, f"eth{number}", number=number, mtu=load.MTU)
        space.ip(f"route add default via 10.{number}.0.1")
        with in_container(stage, f"--with-ns=network:{space.path}", serves=serves) as worker:
            yield worker


def _card(host: Space, number: int) -> bare.Card:
    tap = f"tap{number}"
    host.ip(f"tuntap add {tap} mode tap vnet_hdr")
    host.ip(f"link set {tap} mtu {load.MTU} up")
    host.ip(f"addr add 10.{number}.0.1/24 dev {tap}")
    return bare.Card(space=host, tap=tap, address=f"10.{number}.0.2/24", gateway=f"10.{number}.0.1")

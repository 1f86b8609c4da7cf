"""Unnamed network namespaces: one for each pod, and one with the other ends of their cables."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shim.host import kernel
from tests.patience import patient
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")

COMMAND_TIMEOUT_S = patient(60.0)


class Space:
    """A network namespace.

    :param path: its path.
    :param pid: the pid of a process in it.
    """

    def __init__(self, path: Path, *, pid: int = 0) -> None:
        self.path = path
        self.pid = pid

    def run(self, *command: str) -> str:
        """Run a program in it and return its output."""
        argv = ["nsenter", f"--net={self.path}", *command]
        return subprocess.run(
            argv, check=True, stdout=subprocess.PIPE, text=True, timeout=COMMAND_TIMEOUT_S
        ).stdout

    def ip(self, command: str) -> str:
        """Run ``ip`` in it."""
        return self.run("ip", *command.split())

    def inside(self, work: Callable[[], _T]) -> _T:
        """Call a function in it; sockets that the function opens stay there."""
        outcome: list[_T] = []

        def enter_and_work() -> None:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                kernel.enter_network_namespace(descriptor)
            finally:
                os.close(descriptor)
            outcome.append(work())

        thread = threading.Thread(target=enter_and_work)
        thread.start()
        thread.join()
        return outcome[0]

    def set(self, parameter: str, value: str) -> None:
        """Set one of its kernel parameters, named with slashes."""
        self.inside(lambda: Path(f"/proc/sys/{parameter}").write_text(value, encoding="ascii"))

    def wait_for(self, text: str, command: str) -> None:
        """Wait until the output of ``ip`` in it has a text; the kernel reports no end of such work."""
        until(lambda: text in self.ip(command), within_s=COMMAND_TIMEOUT_S)

    def configuration(self) -> list[str]:
        """List everything that a machine's network may change in it."""
        return [
            *self.ip("-oneline link").splitlines(),
            *self.ip("-oneline address").splitlines(),
            *self.ip("route show table all").splitlines(),
            *self.ip("-6 route show table all").splitlines(),
            *(line for line in self.run("tc", "qdisc").splitlines() if "ingress" in line),
        ]


@contextlib.contextmanager
def new_space() -> Iterator[Space]:
    """Make a network namespace with nothing but its loopback, which is up."""
    argv = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo; exec sleep infinity"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline(), "util-linux and iproute2 are needed; run scripts/setup"
        try:
            yield Space(Path(f"/proc/{holder.pid}/ns/net"), pid=holder.pid)
        finally:
            holder.kill()


def add_cable(pod: Space, outside: Space, name: str, *, number: int, mtu: int = 1400) -> None:
    """Connect two namespaces by an interface that has the same name in both.

    :param number: of its networks, 10.N.0.0/24 and fd00:N::/64; the pod is 2 in both, the outside 1.
    """
    pod.ip(f"link add {name} mtu {mtu} type veth peer name {name} mtu {mtu} netns {outside.pid}")
    outside.ip(f"addr add 10.{number}.0.1/24 dev {name}")
    outside.ip(f"addr add fd00:{number}::1/64 dev {name} nodad")
    outside.ip(f"link set {name} addrgenmode none up")
    pod.ip(f"addr add 10.{number}.0.2/24 dev {name}")
    pod.ip(f"addr add fd00:{number}::2/64 dev {name} nodad")
    # The kernel's own address would appear some time after the rest.
    pod.ip(f"link set {name} addrgenmode none up")
    # The kernel does this last, at each end some time after the other end came up.
    for space in (outside, pod):
        space.wait_for(f"multicast ff00::/8 dev {name} ", "-6 route show table all")

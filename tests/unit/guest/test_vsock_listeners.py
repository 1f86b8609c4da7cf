"""Only the host may connect to the agent; if any host user could connect, only privileged ones may."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from guest.agent import vsock
from proto.extensions import PRIVILEGED_PARAMETER
from tests.descriptors import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

HOST, LOOPBACK, ANOTHER = 2, 1, 77
PRIVILEGED, OTHER = 1023, 1024
RESTRICTED = f"quiet {PRIVILEGED_PARAMETER} panic=-1"

Address = tuple[int, int]


class Socket:
    """A listening socket with the connections that a test gives it; their descriptors belong to a file."""

    addresses: list[Address]

    def __init__(self, *_kind: int) -> None:
        self.bound: Address = (0, 0)

    def bind(self, address: Address) -> None:
        self.bound = address

    def listen(self, _backlog: int) -> None:
        """Take connections."""

    def _accept(self) -> tuple[int, Address]:
        return os.open(os.devnull, os.O_RDONLY), self.addresses.pop(0)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[Address]], int]:
    """Offer connections to a listener, and return the port of the first that it accepts."""
    monkeypatch.setattr(vsock._socket, "socket", Socket)

    def to_listener(command_line: str, addresses: list[Address]) -> int:
        monkeypatch.setattr(Socket, "addresses", list(addresses), raising=False)
        fd, port = vsock.Listener(1028, command_line).accept()
        os.close(fd)
        return port

    return to_listener


def test_the_host_may_connect_from_any_port_if_only_one_process_can(
    offer: Callable[[str, list[Address]], int],
) -> None:
    assert offer("quiet", [(HOST, OTHER)]) == OTHER


def test_unprivileged_host_users_are_refused_if_the_command_line_says_so(
    offer: Callable[[str, list[Address]], int],
) -> None:
    strangers = [(HOST, OTHER), (HOST, 40_000), (LOOPBACK, PRIVILEGED), (ANOTHER, PRIVILEGED)]
    assert offer(RESTRICTED, [*strangers, (HOST, PRIVILEGED)]) == PRIVILEGED


def test_the_guests_own_processes_are_refused(offer: Callable[[str, list[Address]], int]) -> None:
    assert offer("quiet", [(LOOPBACK, PRIVILEGED), (ANOTHER, OTHER), (HOST, 5000)]) == 5000


def test_a_refused_connection_is_closed(offer: Callable[[str, list[Address]], int]) -> None:
    before = descriptors()
    offer(RESTRICTED, [(HOST, OTHER)] * 10 + [(HOST, PRIVILEGED)])
    assert descriptors() <= before

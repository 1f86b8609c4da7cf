"""A pod's network namespace, and the one that its cables lead to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shim.host.ledger import Ledger
from tests.network_space import Space, add_cable, new_space

from .machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def outside() -> Iterator[Space]:
    """The other end of the pod's cables."""
    with new_space() as space:
        yield space


@pytest.fixture
def empty_pod() -> Iterator[Space]:
    """A pod that has no network yet."""
    with new_space() as space:
        yield space


@pytest.fixture
def pod(empty_pod: Space, outside: Space) -> Space:
    """A pod as CNI leaves it: one cable, both families, a default route."""
    add_cable(empty_pod, outside, "eth0", number=1)
    empty_pod.ip("route add default via 10.1.0.1")
    empty_pod.ip("-6 route add default via fe80::1 dev eth0")
    return empty_pod


@pytest.fixture
def state_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture
def ledger(state_directory: Path) -> Iterator[Ledger]:
    ledger = Ledger(str(state_directory), create=True)
    yield ledger
    ledger.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.die()

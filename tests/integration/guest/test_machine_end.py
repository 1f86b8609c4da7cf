"""How the machine ends: on request, and on a defect."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from proto.kata import agent_pb2
from tests.integration.guest.agent_client import StatusError
from tests.integration.guest.conftest import IMAGE, Life
from tests.integration.guest.guest_machine import GuestMachine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def own_machine(tmp_path: Path) -> Iterator[GuestMachine]:
    machine = GuestMachine(tmp_path, IMAGE, channel="serial")
    try:
        yield machine
    finally:
        machine.close()


def test_destroying_the_sandbox_writes_back_and_powers_off(own_machine: GuestMachine) -> None:
    own_machine.create_sandbox()
    with pytest.raises(StatusError, match="exists already"):
        own_machine.create_sandbox()
    own_machine.make_rootfs("last")
    container = Life(own_machine, "last")
    container.run("sh", "-c", "echo kept > /kept; echo ready; sleep 100")
    assert container.read() == b"ready\n"
    # The machine may be gone before its answer is.
    with contextlib.suppress(ConnectionError):
        own_machine.client.call("DestroySandbox", agent_pb2.DestroySandboxRequest())
    assert own_machine.qemu.wait(timeout=20) == 0
    assert (own_machine.share / "last/rootfs/kept").read_text() == "kept\n"

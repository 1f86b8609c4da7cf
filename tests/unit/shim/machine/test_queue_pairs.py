"""How many queue pairs a network card gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Accelerator, Channel
from shim.config import Config
from shim.machine.host_choice import HostChoice
from shim.machine.sizing import Size
from shim.machine.spec import describe, queue_pairs

if TYPE_CHECKING:
    from hypervisor import interface


CHOICE = HostChoice(
    accelerator=Accelerator.KVM,
    accelerator_reason="",
    channel=Channel.VHOST_VSOCK,
    channel_reason="",
    virtiofsd=Path("/virtiofsd"),
    vsock_daemon=None,
)


@pytest.mark.parametrize(
    ("accelerator", "vcpus", "most", "pairs"),
    [
        (Accelerator.KVM, 1, 4, 4),
        (Accelerator.KVM, 1, 96, 8),
        (Accelerator.KVM, 12, 12, 8),
        (Accelerator.TCG, 1, 96, 1),
        (Accelerator.TCG, 3, 96, 3),
    ],
    ids=["can grow", "can grow far", "large", "emulated", "emulated, larger"],
)
def test_a_card_has_a_queue_pair_for_each_possible_processor(
    accelerator: interface.Accelerator, vcpus: int, most: int, pairs: int
) -> None:
    spec = describe(
        Config(),
        replace(CHOICE, accelerator=accelerator),
        name="s",
        directory=Path("/d"),
        share=Path("/s"),
        size=Size(vcpus=vcpus, memory_bytes=512 << 20),
        most=Size(vcpus=most, memory_bytes=1 << 30),
    )
    assert queue_pairs(spec) == pairs

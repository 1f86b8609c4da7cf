"""Describes a sandbox's virtual machine to the hypervisor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import Accelerator, VmSpec

if TYPE_CHECKING:
    from shim.config import Config
    from shim.machine.host_choice import HostChoice
    from shim.machine.sizing import Size

MOST_QUEUE_PAIRS = 8
"""The most queue pairs of a card. Each costs a thread of the host's kernel, for each card of each sandbox."""


def queue_pairs(spec: VmSpec) -> int:
    """Return how many queue pairs each network card gets: one for each processor that can be plugged.

    The guest uses as many as it has processors. Under emulation, one thread of QEMU serves all of them, so
    queues for future processors are useless.

    :param spec: the machine.
    """
    wanted = spec.max_vcpus if spec.accelerator is Accelerator.KVM else spec.vcpus
    return min(wanted, MOST_QUEUE_PAIRS)


def describe(
    config: Config, choice: HostChoice, *, name: str, directory: Path, share: Path, size: Size, most: Size
) -> VmSpec:
    """Describe a machine to boot.

    :param config: the operator's configuration.
    :param choice: the means of this host.
    :param name: its name, usually the sandbox's id.
    :param directory: where its sockets and its console's log go.
    :param share: the directory that its guest sees.
    :param size: its size at the start.
    :param most: its greatest size.
    """
    return VmSpec(
        name=name,
        directory=directory,
        qemu=Path(config.hypervisor.qemu),
        machine_options=config.hypervisor.machine_options,
        kernel=Path(config.guest.kernel),
        initrd=Path(config.guest.initrd),
        kernel_parameters=tuple(config.guest.kernel_parameters.split()),
        accelerator=choice.accelerator,
        vcpus=size.vcpus,
        max_vcpus=most.vcpus,
        memory_bytes=size.memory_bytes,
        max_memory_bytes=most.memory_bytes,
        share_source=share,
        virtiofsd=choice.virtiofsd,
        channel=choice.channel,
        vsock_daemon=choice.vsock_daemon,
        network_namespace=None,
        root_ports=config.hypervisor.root_ports,
        huge_pages=config.hypervisor.huge_pages,
    )

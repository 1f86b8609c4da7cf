"""Everything that depends on the architecture of the machine, in one value per architecture."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from hypervisor.errors import UnsupportedHostError
from hypervisor.interface import Accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How one architecture's virtual machine differs from another's.

    :param type: QEMU's machine type with the properties that are always set.
    :param cpu_models: the CPU model for each accelerator.
    :param early_console: QEMU's device that shows the guest kernel's messages before the virtio console
        driver is loaded.
    :param kernel_parameters: the guest kernel's parameters that make sense on this machine only.
    """

    type: str
    cpu_models: dict[Accelerator, str]
    early_console: str
    kernel_parameters: tuple[str, ...]


X86_64 = Machine(
    # q35 because it hotplugs, and because microvm hangs now and then under TCG while calibrating its clock.
    # Switched off: what no guest of ours uses but its kernel would probe (disk controller, SMBus, VMware
    # port, USB) and system management mode, which costs the firmware a relocation under TCG and KVM alike.
    type="q35,sata=off,smbus=off,smm=off,vmport=off,usb=off",
    cpu_models={
        # Everything the host has, except the performance counters: they leak timing between tenants, and a
        # nested host often lacks them.
        Accelerator.KVM: "host,pmu=off",
        Accelerator.TCG: "max",
    },
    early_console="isa-serial",
    kernel_parameters=(
        # The virtio console is a module in distribution kernels; a panic before it is loaded (no init, a
        # broken initrd) would otherwise leave no trace.
        "earlyprintk=ttyS0",
        # Reset through the keyboard controller: QEMU notices at once; the default tries ACPI first.
        "reboot=k",
    ),
)

_MACHINES = {"x86_64": X86_64}


def for_host() -> Machine:
    """Return the machine description for the host's architecture.

    :raises UnsupportedHostError: if there is none.
    """
    architecture = platform.machine()
    try:
        return _MACHINES[architecture]
    except KeyError:
        raise UnsupportedHostError(
            f"start vm: host: architecture {architecture} is not supported; use {', '.join(_MACHINES)}"
        ) from None

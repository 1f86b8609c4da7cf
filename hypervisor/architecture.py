"""How virtual machines differ between architectures, and the architecture of this host."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor import x86_64
from hypervisor.errors import UnsupportedHostError

if TYPE_CHECKING:
    from hypervisor.interface import Accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The parts of a virtual machine that depend on the architecture.

    :param type: QEMU's machine type with the properties that are always set.
    :param cpu_models: the CPU model for each accelerator.
    :param early_console: QEMU's device that shows the guest kernel's messages before the virtio console
        driver is loaded.
    :param kernel_parameters: the guest kernel's parameters that make sense only on this machine.
    :param translated_kernel_parameters: those that make sense if the processor is emulated.
    :param probe_kernel: a kernel that computes for a moment, then makes QEMU exit with ``probe_status``.
    :param probe_device: the QEMU device through which it does so.
    :param probe_status: QEMU's exit status then.
    """

    type: str
    cpu_models: dict[Accelerator, str]
    early_console: str
    kernel_parameters: tuple[str, ...]
    translated_kernel_parameters: tuple[str, ...]
    probe_kernel: bytes
    probe_device: str
    probe_status: int


X86_64 = Architecture(
    type=x86_64.MACHINE_TYPE,
    cpu_models=x86_64.CPU_MODELS,
    early_console=x86_64.EARLY_CONSOLE,
    kernel_parameters=x86_64.KERNEL_PARAMETERS,
    translated_kernel_parameters=x86_64.TRANSLATED_KERNEL_PARAMETERS,
    probe_kernel=x86_64.probe_kernel(),
    probe_device=x86_64.PROBE_DEVICE,
    probe_status=x86_64.PROBE_STATUS,
)

_ARCHITECTURES = {"x86_64": X86_64}


def for_host() -> Architecture:
    """Return the host's architecture.

    :raises UnsupportedHostError: if there is none.
    """
    architecture = platform.machine()
    try:
        return _ARCHITECTURES[architecture]
    except KeyError:
        raise UnsupportedHostError(
            f"start vm: host: architecture {architecture} is not supported; use {', '.join(_ARCHITECTURES)}"
        ) from None

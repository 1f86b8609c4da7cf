"""The only code that knows what a virtual machine is made of."""

from hypervisor.accelerator import Verdict, choose_accelerator
from hypervisor.errors import (
    ChannelError,
    HotplugError,
    HypervisorError,
    QmpError,
    ResizeError,
    ResizeRefusedError,
    UnsupportedHostError,
    VmStartError,
)
from hypervisor.interface import (
    AGENT_PORT,
    RAW_STREAM_PORT,
    Accelerator,
    Channel,
    Disk,
    DiskLimits,
    HostPciDevice,
    HostProcess,
    Hypervisor,
    Nic,
    VmExit,
    VmSpec,
)
from hypervisor.qemu import QemuHypervisor
from hypervisor.virtiofsd import detect_dialect
from hypervisor.vsock import channel_problem

__all__ = [
    "AGENT_PORT",
    "RAW_STREAM_PORT",
    "Accelerator",
    "Channel",
    "ChannelError",
    "Disk",
    "DiskLimits",
    "HostPciDevice",
    "HostProcess",
    "HotplugError",
    "Hypervisor",
    "HypervisorError",
    "Nic",
    "QemuHypervisor",
    "QmpError",
    "ResizeError",
    "ResizeRefusedError",
    "UnsupportedHostError",
    "Verdict",
    "VmExit",
    "VmSpec",
    "VmStartError",
    "channel_problem",
    "choose_accelerator",
    "detect_dialect",
]

"""The only code that knows how a virtual machine is built."""

from hypervisor.accelerator import Verdict, choose_accelerator
from hypervisor.allowance import Allowance
from hypervisor.argv import TRANSLATED_CODE_MIB
from hypervisor.confinement_probe import jail_problem
from hypervisor.errors import (
    ChannelError,
    GuestLateError,
    HypervisorError,
    JailError,
    ParkedMemoryLostError,
    ResizeError,
    ResizeRefusedError,
    TemplateError,
    TemplateLateError,
    VmStartError,
)
from hypervisor.interface import (
    Accelerator,
    Channel,
    Disk,
    DiskLimits,
    HostPciDevice,
    Hypervisor,
    Identity,
    Nic,
    VmProcess,
    VmSpec,
)
from hypervisor.kvm_host import weaknesses
from hypervisor.lasting_socket import LastingSocket
from hypervisor.nics import vhost_net_problem
from hypervisor.printable import printable
from hypervisor.qemu import QemuHypervisor
from hypervisor.saving import save_template
from hypervisor.template import template_key
from hypervisor.virtiofsd import NAME as SHARE_DAEMON
from hypervisor.virtiofsd import detect_dialect
from hypervisor.vsock import channel_problem

__all__ = [
    "SHARE_DAEMON",
    "TRANSLATED_CODE_MIB",
    "Accelerator",
    "Allowance",
    "Channel",
    "ChannelError",
    "Disk",
    "DiskLimits",
    "GuestLateError",
    "HostPciDevice",
    "Hypervisor",
    "HypervisorError",
    "Identity",
    "JailError",
    "LastingSocket",
    "Nic",
    "ParkedMemoryLostError",
    "QemuHypervisor",
    "ResizeError",
    "ResizeRefusedError",
    "TemplateError",
    "TemplateLateError",
    "Verdict",
    "VmProcess",
    "VmSpec",
    "VmStartError",
    "channel_problem",
    "choose_accelerator",
    "detect_dialect",
    "jail_problem",
    "printable",
    "save_template",
    "template_key",
    "vhost_net_problem",
    "weaknesses",
]

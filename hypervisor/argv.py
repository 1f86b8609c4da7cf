"""QEMU's command line and the guest kernel's, as pure functions. No other module builds their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.interface import Accelerator, Channel, VmSpec
from proto.extensions import (
    PRIVILEGED_PARAMETER,
    RAW_STREAM_PORT,
    RAW_STREAMS_PARAMETER,
    SERIAL_PORT,
    SHARE_TAG,
)

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.architecture import Architecture

MIB = 1 << 20

SHARE_QUEUE = 1024
"""How many requests may be in flight to the virtio-fs daemon."""

HOTPLUG_BUSES = ("slots1", "slots2")
"""The buses into which devices are plugged while the guest runs.

Conventional bridges: two offer 62 slots and were measured to cost no boot time, where as many PCIe root ports
cost the guest a second under TCG. ACPI tells the guest of each device at once.
"""

MEMORY_MODULES = 16
"""How many memory modules can be added."""

TRANSLATED_CODE_MIB = 128
"""The most memory for the code of an emulated processor.

QEMU's own choice is up to a gigabyte, which a guest that lives long would fill; a whole boot fits in less
than this (measured: as fast as the default).
"""

_PORT_ROOM = "mem-reserve=32M,pref64-reserve=32G"

_KERNEL_PARAMETERS = (
    # The virtio console costs the guest least of all consoles, and the host reads it for failure causes.
    "console=hvc0",
    # Only errors: each console byte is an exit from the guest, and routine messages are hundreds of lines.
    "quiet",
    # A panicked guest resets at once, and the reset ends QEMU (-no-reboot).
    "panic=-1",
    # No self-tests of the kernel's ciphers: an eighth of the whole boot under TCG (measured).
    "cryptomgr.notests",
    # No tree of files for tracing: ten thousand of them, made at boot, are eight megabytes of every machine
    # and an eighth of a second under TCG (measured).
    "initcall_blacklist=tracer_init_tracefs",
    # The agent and the runtime use the unified hierarchy; this also tells a guest image with systemd to use
    # it.
    "systemd.unified_cgroup_hierarchy=1",
    "cgroup_no_v1=all",
    # Added memory is used at once. Up to three times the initial memory goes into a separate zone, which can
    # be emptied again.
    "memhp_default_state=online",
    "memory_hotplug.online_policy=auto-movable",
    # 1 MiB of bounce buffers, in 2 KiB pieces: the room for more memory would make it 64 MiB (measured), and
    # virtio devices need none.
    "swiotlb=512",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelVsock:
    """The agent channel through the host kernel.

    :param fd: an opened ``/dev/vhost-vsock`` that has claimed the CID.
    :param cid: the guest's context id.
    """

    fd: int
    cid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UserVsock:
    """The agent channel through a vhost-user vsock daemon.

    :param fd: a socket connected to the daemon.
    """

    fd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialPort:
    """The agent channel through a named virtio-serial port.

    :param fd: a stream socket whose other end is the host's side of the port.
    """

    fd: int


ChannelDevice = KernelVsock | UserVsock | SerialPort


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """File descriptors QEMU inherits, by the number they have in QEMU.

    :param qmp: one end of a socket pair; the control connection.
    :param console: one end of a socket pair, for the guest's console output.
    :param share: a socket connected to the virtio-fs daemon, or ``None`` for a machine without a share.
    :param channel: the agent channel, or ``None`` for a machine without one.
    :param memory: a file that is the guest's memory, or ``None`` for memory that QEMU makes.
    """

    qmp: int
    console: int
    share: int | None
    channel: ChannelDevice | None
    memory: int | None = None


def boot_argv(spec: VmSpec, inherited: Inherited, *, architecture: Architecture) -> list[str]:
    """Build the command line that boots a virtual machine.

    :param spec: the virtual machine.
    :param inherited: the descriptors QEMU will find open.
    :param architecture: the host's.
    :returns: the program and its arguments.
    """
    return [
        *_machine_argv(spec, inherited, architecture=architecture),
        "-kernel", str(spec.kernel),
        "-initrd", str(spec.initrd),
        "-append", kernel_command_line(spec, architecture=architecture),
    ]  # fmt: skip


def clone_argv(spec: VmSpec, inherited: Inherited, *, architecture: Architecture) -> list[str]:
    """Build the command line of a machine that waits to be loaded and then runs.

    :param spec: the virtual machine.
    :param inherited: the descriptors QEMU will find open.
    :param architecture: the host's.
    :returns: the program and its arguments.
    """
    # No kernel: it is in the memory already, and QEMU would read all of it and keep it.
    return [*_machine_argv(spec, inherited, architecture=architecture), "-S", "-incoming", "defer"]


def _machine_argv(spec: VmSpec, inherited: Inherited, *, architecture: Architecture) -> list[str]:
    return [
        str(spec.qemu),
        "-name", f"{_escape(spec.name)},debug-threads=on",
        # Only these: no file of the host adds a device or an option.
        "-no-user-config",
        "-nodefaults",
        "-display", "none",
        # A guest that resets has ended.
        "-no-reboot",
        # Once QEMU runs, a guest cannot make it start a process or gain a privilege.
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", _machine(spec, architecture),
        "-accel", _accelerator(spec.accelerator, vcpus=spec.vcpus),
        "-cpu", architecture.cpu_models[spec.accelerator],
        "-smp", f"cpus={spec.vcpus},maxcpus={spec.max_vcpus}",
        "-m", _memory(spec),
        "-object", _memory_backend(spec, inherited.memory),
        "-chardev", f"socket,id=qmp,fd={inherited.qmp}",
        "-mon", "chardev=qmp,mode=control",
        *_console(inherited.console, architecture),
        *_channel(inherited.channel),
        *_share(inherited.share),
        # Early entropy: without it the guest's first random read may wait.
        "-device", "virtio-rng-pci",
        # Turns a guest panic into an event, with no wait for a reset.
        "-device", "pvpanic-pci",
        # The guest reports the pages it has freed, and the host takes them back.
        "-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on",
        # Last, so that these ports do not move the other devices.
        *_bridges(),
        *_root_ports(spec),
    ]  # fmt: skip


def probe_argv(
    qemu: Path, accelerator: Accelerator, kernel: Path, *, architecture: Architecture
) -> list[str]:
    """Build the command line that runs the probe kernel the way a virtual machine would be run.

    :param qemu: the QEMU system emulator.
    :param accelerator: what to probe.
    :param kernel: a file with the machine's probe kernel.
    :param architecture: the host's.
    """
    return [
        str(qemu),
        "-no-user-config",
        "-nodefaults",
        "-display", "none",
        "-no-reboot",
        "-machine", architecture.type,
        "-accel", _accelerator(accelerator, vcpus=1),
        "-cpu", architecture.cpu_models[accelerator],
        "-m", "32M",
        "-kernel", str(kernel),
        "-device", architecture.probe_device,
    ]  # fmt: skip


def kernel_command_line(spec: VmSpec, *, architecture: Architecture) -> str:
    """Build the guest kernel's command line; the operator's parameters come last, so they win.

    :param spec: the virtual machine.
    :param architecture: the host's.
    """
    parameters = [*_KERNEL_PARAMETERS, *architecture.kernel_parameters]
    if spec.accelerator is Accelerator.TCG:
        parameters += architecture.translated_kernel_parameters
    if spec.channel is Channel.VHOST_VSOCK:
        # An agent tells the connections apart by the ports they come from, which only the kernel's vsock
        # shows to both sides.
        parameters += (f"{RAW_STREAMS_PARAMETER}{RAW_STREAM_PORT}", PRIVILEGED_PARAMETER)
    return " ".join((*parameters, *spec.kernel_parameters))


def _bridges() -> list[str]:
    words = []
    for chassis, bus in enumerate(HOTPLUG_BUSES, start=1):
        # Room for the registers of 31 virtio devices: by default, the firmware leaves none behind a bridge.
        words += ["-device", f"pci-bridge,id={bus},chassis_nr={chassis},shpc=off,mem-reserve=1M"]
    return words


def root_ports(spec: VmSpec) -> list[str]:
    """Name the PCIe root ports that PCI devices of the host are plugged into.

    :param spec: the virtual machine.
    """
    return [f"port{number}" for number in range(1, spec.root_ports + 1)]


def _root_ports(spec: VmSpec) -> list[str]:
    words = []
    for chassis, port in enumerate(root_ports(spec), start=len(HOTPLUG_BUSES) + 1):
        # Room for the memory of an accelerator: by default, the firmware leaves little behind a port.
        words += ["-device", f"pcie-root-port,id={port},chassis={chassis},{_PORT_ROOM}"]
    return words


def _machine(spec: VmSpec, architecture: Architecture) -> str:
    # A core dump never contains the guest's memory, even if the host's limits allow one.
    options = f"{architecture.type},memory-backend=memory,dump-guest-core=off"
    return f"{options},{spec.machine_options}" if spec.machine_options else options


def _memory(spec: VmSpec) -> str:
    size = spec.memory_bytes // MIB
    room = (spec.max_memory_bytes - spec.memory_bytes) // MIB
    if not room:
        return f"{size}M"
    # Twice the room, because addresses cost nothing: the virtio-mem device covers one half. A guest without
    # its driver gets memory modules in the other half.
    return f"size={size}M,slots={MEMORY_MODULES},maxmem={size + 2 * room}M"


def _memory_backend(spec: VmSpec, fd: int | None) -> str:
    kind = "memory-backend-memfd" if fd is None else f"memory-backend-file,mem-path=/proc/self/fd/{fd}"
    # Shared, because the virtio-fs and vsock daemons map the guest's memory.
    huge = ",hugetlb=on" if spec.huge_pages and fd is None else ""
    return f"{kind},id=memory,size={spec.memory_bytes // MIB}M,share=on{huge}"


def _share(fd: int | None) -> list[str]:
    if fd is None:
        return []
    return [
        "-chardev", f"socket,id=share,fd={fd}",
        "-device", f"vhost-user-fs-pci,chardev=share,tag={SHARE_TAG},queue-size={SHARE_QUEUE}",
    ]  # fmt: skip


def _accelerator(accelerator: Accelerator, *, vcpus: int) -> str:
    match accelerator:
        case Accelerator.KVM:
            # The interrupt controllers in the kernel: an interrupt then needs no trip to user space.
            return "kvm,kernel-irqchip=on"
        case Accelerator.TCG:
            # One thread for all virtual CPUs of a machine that boots with several. Linux patches its own code
            # while it boots, and a QEMU before 8.1 misses that if another thread translates the page just
            # then; such a boot was seen to hang. (QEMU's commit deba78709a locks the page.)
            return f"tcg,tb-size={TRANSLATED_CODE_MIB}{',thread=single' if vcpus > 1 else ''}"


def _console(fd: int, architecture: Architecture) -> list[str]:
    # One stream for both, so that early messages and later ones stay in order.
    return [
        "-chardev", f"socket,id=console,fd={fd},mux=on",
        "-device", f"{architecture.early_console},chardev=console",
        # The console and the agent's port: the guest's driver sets up queues for every port offered.
        "-device", "virtio-serial-pci,max_ports=2",
        "-device", "virtconsole,chardev=console",
    ]  # fmt: skip


def _channel(device: ChannelDevice | None) -> list[str]:
    match device:
        case None:
            return []
        case KernelVsock(fd=fd, cid=cid):
            return ["-device", f"vhost-vsock-pci,vhostfd={fd},guest-cid={cid}"]
        case UserVsock(fd=fd):
            return [
                "-chardev", f"socket,id=vsock,fd={fd}",
                "-device", "vhost-user-vsock-pci,chardev=vsock,id=vsock",
            ]  # fmt: skip
        case SerialPort(fd=fd):
            return [
                "-chardev", f"socket,id=agent,fd={fd}",
                "-device", f"virtserialport,chardev=agent,name={SERIAL_PORT}",
            ]  # fmt: skip


def _escape(value: str) -> str:
    """Double each comma, so that QEMU's option parser takes it as part of the value."""
    return value.replace(",", ",,")

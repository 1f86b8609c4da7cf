"""The shim's requests to a virtual machine monitor: one method for each intent, each with a caller."""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from pathlib import Path


class Accelerator(enum.Enum):
    """How guest instructions are run."""

    KVM = "kvm"
    TCG = "tcg"


class Channel(enum.Enum):
    """How the host reaches the guest agent, best first."""

    VHOST_VSOCK = "vhost-vsock"
    VHOST_USER_VSOCK = "vhost-user-vsock"
    VIRTIO_SERIAL = "virtio-serial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The user and the group of all processes of one sandbox, and of no others.

    :param uid: the user's number.
    :param gid: the group's.
    """

    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """The complete description of one virtual machine.

    :param name: shown in process listings and errors; usually the sandbox id.
    :param directory: an existing directory private to this VM; sockets and ``console.log`` go there.
    :param qemu: the QEMU system emulator.
    :param machine_options: the operator's addition to QEMU's ``-machine`` value; normally empty.
    :param kernel: an uncompressed ``vmlinux`` with a PVH entry, or a ``bzImage``.
    :param initrd: the initial RAM file system.
    :param kernel_parameters: the operator's addition to the guest kernel's command line.
    :param accelerator: how guest instructions are run.
    :param vcpus: the number of virtual CPUs at boot, and the least that the machine can have later.
    :param max_vcpus: the most virtual CPUs that it can have.
    :param memory_bytes: guest memory at boot, a multiple of 1 MiB, and the least that it can have later.
    :param max_memory_bytes: the most that it can have; memory above ``memory_bytes`` costs nothing until it
        is used.
    :param share_source: the directory the guest sees under the virtio-fs tag ``kataShared``. It must lie on a
        mount with shared propagation: otherwise the daemon would not see later mounts.
    :param virtiofsd: the virtio-fs daemon, of either dialect.
    :param channel: how the guest agent is reached.
    :param vsock_daemon: the ``vhost-device-vsock`` program; needed for ``VHOST_USER_VSOCK`` only.
    :param network_namespace: the network namespace the VMM is started in, or ``None`` for the caller's. The
        daemons stay in the caller's.
    :param root_ports: how many PCI devices of the host can be plugged. Each port costs boot time.
    :param huge_pages: whether all memory is of huge pages that the host has reserved; not for a clone.
    :param jail: the user of its confined processes; ``None`` for the caller, without confinement.
    :param template: the directory of a template with the same key to clone, or ``None`` to boot.
    """

    name: str
    directory: Path
    qemu: Path
    machine_options: str
    kernel: Path
    initrd: Path
    kernel_parameters: tuple[str, ...]
    accelerator: Accelerator
    vcpus: int
    max_vcpus: int
    memory_bytes: int
    max_memory_bytes: int
    share_source: Path
    virtiofsd: Path
    channel: Channel
    vsock_daemon: Path | None
    network_namespace: Path | None
    root_ports: int
    huge_pages: bool = False
    jail: Identity | None = None
    template: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network interface of the guest.

    :param id: its name among the virtual machine's devices: a letter, then letters, digits, ``-._``.
    :param mac: its Ethernet address, as ``02:00:00:00:00:01``.
    :param tap_fds: open tap descriptors, one for each pair of queues; they stay the caller's to close.
    """

    id: str
    mac: str
    tap_fds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLimits:
    """How fast the guest may read and write a disk; 0 sets no limit.

    :param read_iops: read operations per second.
    :param write_iops: write operations per second.
    :param read_bytes_per_s: bytes read per second.
    :param write_bytes_per_s: bytes written per second.
    """

    read_iops: int = 0
    write_iops: int = 0
    read_bytes_per_s: int = 0
    write_bytes_per_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk of the guest.

    :param id: its name among the virtual machine's devices: a letter, then letters, digits, ``-._``.
    :param path: a file or a block device (also a loop device) of the host, with the disk's bytes as they are.
    :param serial: the serial number that the guest reads: at most 20 bytes; may be empty.
    :param read_only: whether the guest may only read it.
    :param discard: whether blocks that the guest discards are given back to the host.
    :param limits: how fast it may be read and written.
    """

    id: str
    path: Path
    serial: str
    read_only: bool
    discard: bool
    limits: DiskLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPciDevice:
    """A PCI device of the host that the guest itself drives.

    :param id: its name among the virtual machine's devices: a letter, then letters, digits, ``-._``.
    :param address: its place on the host, as ``0000:3b:00.0``.
    """

    id: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmExit:
    """The end of a virtual machine.

    :param reason: one line, for example ``guest panicked: ...`` or ``QEMU killed by signal 9``.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmProcess:
    """A process on the host that serves one virtual machine.

    :param name: its role: ``QEMU``, ``virtio-fs daemon``, ``vhost-device-vsock``.
    :param pid: its process id.
    """

    name: str
    pid: int


class Hypervisor(abc.ABC):
    """One virtual machine, from start to end. An instance is used once."""

    @abc.abstractmethod
    async def start(self, *, timeout_s: float) -> None:
        """Start the daemons and the VMM; return when the virtual machine runs.

        :param timeout_s: the longest this may take, in seconds.
        :raises UnsupportedHostError: if this machine's architecture is not supported.
        :raises TemplateError: if the template to clone cannot be used; a machine without one may start.
        :raises JailError: if one of its processes could not be confined; one without may start.
        :raises VmStartError: if anything failed or the time ran out. Nothing is left running.
        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """Kill the virtual machine; return when all its processes are gone.

        May be called at any time, repeatedly and by several tasks at once.
        """

    @abc.abstractmethod
    async def wait(self) -> VmExit:
        """Block until the virtual machine is gone.

        :returns: why it ended.
        """

    @abc.abstractmethod
    async def connect(self, port: int, *, timeout_s: float) -> socket.socket:
        """Connect to a port of the guest, and wait until the guest listens there.

        :param port: the guest's port; over virtio-serial only ``AGENT_PORT`` exists, and only once.
        :param timeout_s: the longest this may take, in seconds.
        :returns: a connected, non-blocking stream socket, the caller's to close.
        :raises ChannelError: if the time ran out, the virtual machine died (the text has the reason),
            or the channel has no such port.
        """

    @abc.abstractmethod
    async def plug_nic(self, nic: Nic) -> str:
        """Add a network interface to the running virtual machine.

        :param nic: the interface.
        :returns: the PCI path at which the guest sees it, in the form of Kata's agent protocol: ``02/1e``.
        :raises HotplugError: if it cannot be added; nothing of it is left.
        :raises QmpError: if the VMM does not answer.
        """

    @abc.abstractmethod
    async def plug_disk(self, disk: Disk) -> str:
        """Add a disk to the running virtual machine.

        :param disk: the disk.
        :returns: the PCI path at which the guest sees it, in the form of Kata's agent protocol: ``02/1e``.
        :raises HotplugError: if it cannot be added; nothing of it is left.
        :raises QmpError: if the VMM does not answer.
        """

    @abc.abstractmethod
    async def resize_disk(self, device_id: str) -> int:
        """Tell the guest the present size of the file or device behind a disk.

        :param device_id: the id it was plugged with.
        :returns: the size, in bytes.
        :raises HotplugError: if there is no such disk, or the VMM refuses.
        :raises QmpError: if the VMM does not answer.
        """

    @abc.abstractmethod
    async def limit_disk(self, device_id: str, limits: DiskLimits) -> None:
        """Replace a disk's rate limits.

        :param device_id: the id it was plugged with.
        :param limits: the new ones.
        :raises HotplugError: if there is no such disk, or the VMM refuses.
        :raises QmpError: if the VMM does not answer.
        """

    @abc.abstractmethod
    async def plug_pci(self, device: HostPciDevice) -> str:
        """Give the running virtual machine a PCI device of the host.

        :param device: the device.
        :returns: the PCI path at which the guest sees it, in the form of Kata's agent protocol: ``06/00``.
        :raises HotplugError: if the host has no IOMMU, the device has another driver than ``vfio-pci``, all
            root ports are taken, or the VMM refuses; nothing of it is left.
        :raises QmpError: if the VMM does not answer.
        """

    @abc.abstractmethod
    async def unplug(self, device_id: str, *, timeout_s: float) -> None:
        """Take a device from the guest, and remove it with its backend.

        :param device_id: the id it was plugged with.
        :param timeout_s: how long the guest may take to release it, in seconds.
        :raises HotplugError: if there is no such device, or the guest refuses or does not answer in time. The
            device stays. If the guest releases it later, it is removed then.
        :raises QmpError: if the VMM does not answer.
        """

    @abc.abstractmethod
    async def resize_vcpus(self, count: int) -> int:
        """Change the number of virtual CPUs; the guest uses new ones once its agent is told to.

        :param count: the wanted number; the newest are removed first.
        :returns: the number now, by the VMM's count; it is higher if the VMM cannot remove vCPUs (emulation).
            The guest's agent must leave the others unused.
        :raises ResizeError: if the machine cannot have this number, or the VMM refuses.
        :raises ResizeRefusedError: if the guest refuses or does not answer; it has ``reached``.
        """

    @abc.abstractmethod
    async def pin_vcpus(self, cpus: frozenset[int]) -> None:
        """Pin the virtual CPUs to processors of the host: each to its own if there are enough.

        :param cpus: the processors' numbers; if there are none, all that the VMM may use.
        :raises ResizeError: if the host has no such processor, or the VMM does not answer.
        """

    @abc.abstractmethod
    async def resize_memory(self, size: int) -> int:
        """Change the memory; return when the guest has accepted it or given it back.

        The guest must have the driver; its agent loads it when it is told that memory will be added.

        :param size: the wanted size, in bytes; rounded up to a size that the guest can have.
        :returns: how much there is now, in bytes, by the VMM's own count.
        :raises ResizeError: if the machine cannot have this size, or the VMM refuses.
        :raises ResizeRefusedError: if the guest stops too early; the error has ``reached``, in bytes.
        """

    @abc.abstractmethod
    async def park(self, file: int) -> int:
        """Stop the virtual CPUs and move the memory to a file; nothing else can be done until :meth:`unpark`.

        Nothing may be sent to the guest in between.

        :param file: the descriptor of an empty file on a disk; it stays the caller's to close.
        :returns: how much memory that has taken from RAM, in bytes.
        :raises ParkError: if the machine cannot be parked; it runs then as before.
        """

    @abc.abstractmethod
    async def unpark(self) -> None:
        """Move the memory of a parked machine back, and let it run; nothing happens if it is not parked.

        :raises ParkedMemoryLostError: if the memory is lost: the machine must be stopped.
        :raises ParkError: if it failed for another reason; the machine is still parked.
        """

    @property
    @abc.abstractmethod
    def share_file_limit(self) -> int:
        """How many files the share's server may open; it has one open for each file that the guest knows.

        :raises ProcessLookupError: if the server is gone.
        """

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """The process id of the VMM.

        :raises HypervisorError: before ``start`` has returned.
        """

    @property
    @abc.abstractmethod
    def is_starved(self) -> bool:
        """Whether the VMM runs, and has waited for processors longer than it has used them."""

    @property
    @abc.abstractmethod
    def was_starved(self) -> bool:
        """Whether the VMM was starved when ``stop`` killed it."""

    @abc.abstractmethod
    def console_tail(self, lines: int = 20) -> list[str]:
        """Return the last lines the guest wrote to its console.

        :param lines: how many at most.
        """

    @abc.abstractmethod
    def processes(self) -> list[VmProcess]:
        """Return every live process that serves this virtual machine."""

"""A virtual machine's cold start: daemons, then QEMU, which boots the guest's kernel."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from hypervisor import architecture, virtiofsd
from hypervisor.argv import HOTPLUG_BUSES, Inherited, boot_argv, root_ports
from hypervisor.console import Console
from hypervisor.devices import Devices
from hypervisor.errors import QmpError, VmStartError
from hypervisor.qmp import QmpSession
from hypervisor.vsock import make_channel

if TYPE_CHECKING:
    from hypervisor.host_side import HostSide
    from hypervisor.interface import VmSpec


async def boot(spec: VmSpec, host: HostSide) -> Devices:
    """Start a machine; return when it runs.

    :param spec: the virtual machine.
    :param host: keeps each part from its start on; after an error, the caller ends the parts.
    :returns: its plugged devices: none yet.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises VmStartError: if anything failed.
    :raises OSError: if the host lacks something.
    """
    host_architecture = architecture.for_host()
    for file in (spec.kernel, spec.initrd):
        if not file.is_file():
            raise VmStartError(f"start vm: {file}: no such file; build the guest image")
    virtiofsd.check_propagation(spec.share_source)
    dialect = await virtiofsd.detect_dialect(spec.virtiofsd)
    with ExitStack() as handover:
        listener, share = virtiofsd.connected_pair(spec.directory)
        handover.enter_context(share)
        with listener, host.phase("spawn virtio-fs daemon"):
            daemon = virtiofsd.start(spec, dialect, listener=listener, host=host)
        host.channel = make_channel(spec, spawn=host.spawn)
        with host.phase("open agent's channel"):
            device = await host.channel.open(handover)
        host.qmp = qmp = QmpSession(spec.name, handover=handover, on_command=host.on_command)
        host.console = Console(
            spec.directory / "console.log", handover=handover, on_pause=host.on_console_pause
        )
        inherited = Inherited(
            qmp=qmp.qemu_fd, console=host.console.qemu_fd, share=share.fileno(), channel=device
        )
        with host.phase("spawn QEMU"):
            qemu = host.spawn_qemu(
                spec,
                boot_argv(spec, inherited, architecture=host_architecture),
                inherit=[inherited.qmp, inherited.console, share.fileno(), device.fd],
                boots=True,
            )
    try:
        with host.phase("QMP"):
            await qmp.connect()
            state = await qmp.run_state()
        await host.seclude_qemu(qemu, spec)
    except QmpError as error:
        raise VmStartError(f"start vm: {await host.early_cause(error)}") from error
    if state != "running":
        raise VmStartError(f"start vm: QEMU: the virtual machine is {state}, not running")
    await virtiofsd.settle(daemon, dialect, spec, host)
    return Devices(qmp, buses=HOTPLUG_BUSES, ports=root_ports(spec))

"""Network interfaces as QEMU wants them described."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hypervisor.devices import Command, Description
from hypervisor.errors import QmpError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.devices import Devices
    from hypervisor.interface import Nic
    from hypervisor.qmp import QmpSession


async def plug(nic: Nic, *, session: QmpSession, devices: Devices) -> str:
    """Add a network interface.

    :param nic: the interface.
    :param session: the control connection.
    :param devices: where it is plugged.
    :returns: its PCI path in the guest.
    :raises HotplugError: if it cannot be added; nothing of it is left.
    :raises QmpError: if QEMU does not answer.
    """
    fd_names: list[str] = []
    try:
        for fd in nic.tap_fds:
            fd_names.append(await session.send_fd(fd))  # noqa: PERF401 - what was sent must be known if one fails
        return await devices.plug(describe(nic, fd_names=fd_names))
    except BaseException:
        for name in fd_names:
            with contextlib.suppress(QmpError):  # refused if the tap backend took it: that has closed it
                await session.ask(dict, "closefd", {"fdname": name})
        raise


def describe(nic: Nic, *, fd_names: Sequence[str]) -> Description:
    """Describe a virtio-net device on tap descriptors.

    :param nic: the interface.
    :param fd_names: the names under which QEMU holds the interface's tap descriptors.
    """
    backend = f"{nic.id}-tap"
    queues = len(fd_names)
    properties: dict[str, object] = {
        "netdev": backend,
        "mac": nic.mac,
        # Modern virtio only: the old interface would need I/O ports, of which a bridge has few.
        "disable-legacy": "on",
        # Nobody boots from it, and the ROM is a file that a QEMU may have been installed without.
        "romfile": "",
    }
    if queues > 1:
        # Two vectors for each pair of queues, one for the control queue, one for changes of configuration.
        properties |= {"mq": True, "vectors": 2 * queues + 2}
    return Description(
        id=nic.id,
        driver="virtio-net-pci",
        properties=properties,
        backend=[Command("netdev_add", {"type": "tap", "id": backend, "fds": ":".join(fd_names)})],
        undo=[Command("netdev_del", {"id": backend})],
    )

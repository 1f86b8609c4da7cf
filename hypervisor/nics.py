"""Network interfaces as QEMU wants them described."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.devices import Command, Description

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.interface import Nic


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
        # A descriptor that the tap backend did not take is still there by its name.
        undo=[
            Command("netdev_del", {"id": backend}),
            *(Command("closefd", {"fdname": name}) for name in fd_names),
        ],
    )

"""Network interfaces, described for QEMU."""

from __future__ import annotations

import contextlib
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.devices import Command, Description
from hypervisor.errors import HotplugError, QmpError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hypervisor.devices import Devices
    from hypervisor.interface import Nic
    from hypervisor.qmp import QmpSession

log = logging.getLogger(__name__)

_VHOST_NET = Path("/dev/vhost-net")
_VHOST = "vhost"


async def plug(nic: Nic, *, session: QmpSession, devices: Devices) -> str:
    """Add a network interface. The host's kernel moves its packets (vhost-net) if it can, else QEMU does.

    :param nic: the interface.
    :param session: the control connection.
    :param devices: where it is plugged.
    :returns: its PCI path in the guest.
    :raises HotplugError: if it cannot be added; nothing of it is left.
    :raises QmpError: if QEMU does not answer.
    """
    with ExitStack() as opened:
        vhost_fds = _open_vhost(len(nic.tap_fds), opened)
        if vhost_fds:
            try:
                return await _plug(nic, vhost_fds, session=session, devices=devices)
            except HotplugError as error:
                if _VHOST not in str(error):
                    raise
                log.warning("plug: %s: QEMU moves its packets, not the kernel: %s", nic.id, error)
    return await _plug(nic, (), session=session, devices=devices)


def vhost_net_problem() -> str | None:
    """Return why the host's kernel cannot move packets for guests; ``None`` if it can."""
    try:
        os.close(os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{_VHOST_NET}: {error.strerror}"
    return None


def _open_vhost(queues: int, opened: ExitStack) -> tuple[int, ...]:
    """Open vhost-net once for each pair of queues; return nothing if the host has none to offer."""
    fds = []
    for _ in range(queues):
        try:
            fds.append(os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            log.debug("%s: %s", _VHOST_NET, error.strerror)
            return ()
        opened.callback(os.close, fds[-1])
    return tuple(fds)


async def _plug(nic: Nic, vhost_fds: Iterable[int], *, session: QmpSession, devices: Devices) -> str:
    sent: list[str] = []

    async def send(fds: Iterable[int]) -> list[str]:
        names = []
        for fd in fds:
            names.append(await session.send_fd(fd))
            sent.append(names[-1])
        return names

    try:
        description = describe(nic, fd_names=await send(nic.tap_fds), vhost_names=await send(vhost_fds))
        return await devices.plug(description)
    except BaseException:
        for name in sent:
            with contextlib.suppress(QmpError):  # refused if the tap backend has taken it, and so closed it
                await session.ask(dict, "closefd", {"fdname": name})
        raise


def describe(nic: Nic, *, fd_names: Sequence[str], vhost_names: Sequence[str] = ()) -> Description:
    """Describe a virtio-net device on tap descriptors.

    :param nic: the interface.
    :param fd_names: the names under which QEMU holds the interface's tap descriptors.
    :param vhost_names: the names of as many vhost-net descriptors; without them, QEMU moves the packets.
    """
    backend = f"{nic.id}-tap"
    queues = len(fd_names)
    properties: dict[str, object] = {
        "netdev": backend,
        "mac": nic.mac,
        # Modern virtio only: the old interface needs I/O ports, and a bridge has few.
        "disable-legacy": "on",
        # No guest boots from it, and QEMU may be installed without the ROM's file.
        "romfile": "",
    }
    if queues > 1:
        # Two vectors for each pair of queues, one for the control queue, one for changes of configuration.
        properties |= {"mq": True, "vectors": 2 * queues + 2}
    tap: dict[str, object] = {"type": "tap", "id": backend, "fds": ":".join(fd_names)}
    if vhost_names:
        tap |= {"vhost": True, "vhostfds": ":".join(vhost_names)}
    return Description(
        id=nic.id,
        driver="virtio-net-pci",
        properties=properties,
        backend=[Command("netdev_add", tap)],
        undo=[Command("netdev_del", {"id": backend})],
    )

"""Waiting for a clone to answer, and whose fault it is if it does not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hypervisor import GuestLateError, TemplateLateError
from shim.errors import DeadlineExceeded

if TYPE_CHECKING:
    import socket

    from hypervisor import QemuHypervisor

log = logging.getLogger(__name__)

LATE = (TemplateLateError, GuestLateError, DeadlineExceeded)
"""What a clone that is late fails with: its template may be to blame, or the host."""

_STARVED_TIMES = 4


async def dial_clone(vm: QemuHypervisor, port: int, *, timeout_s: float) -> socket.socket:
    """Connect to a clone, and wait longer for one that hardly had a processor: a boot would need more of one.

    :param vm: the clone.
    :param port: the guest's port.
    :param timeout_s: how long it may take, in seconds, up to four times if the host leaves it no processor.
    :raises ChannelError: if it does not answer, or has ended.
    """
    for _ in range(_STARVED_TIMES - 1):
        try:
            return await vm.connect(port, timeout_s=timeout_s)
        except GuestLateError as error:
            if not vm.is_starved:
                raise
            log.info(
                "boot: the clone waits for a processor more than it has one, and is waited for: %s", error
            )
    return await vm.connect(port, timeout_s=timeout_s)


def blames_template(error: Exception, *, starved: bool) -> bool:
    """Tell whether the failure of a clone is its template's fault, rather than that of a busy host.

    :param error: the failure.
    :param starved: whether the clone's QEMU waited for a processor for longer than it had one.
    """
    return not (starved and isinstance(error, LATE))

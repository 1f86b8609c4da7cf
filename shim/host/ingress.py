"""Remove the redirection of an interface's packets; everything else for a machine ends with its taps.

Only the standard library: ``delete`` does this too, after a crash of the shim.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from shim.host import kernel

_SETTLED = (errno.ENODEV, errno.ENOENT, errno.EINVAL)  # no such interface; no such queueing discipline, twice
# The numbers are those of rtnetlink(7) and linux/pkt_sched.h.
_RTM_DELQDISC = 37
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_TC_H_INGRESS = 0xFFFFFFF1
_INGRESS_HANDLE = 0xFFFF0000
_MESSAGE = "=IHHII" + "BxxxiIII"
_ERROR = "=IHHIIi"


def remove_ingress(index: int) -> None:
    """Remove an interface's ingress queueing discipline and its filters, in the calling thread's namespace.

    :param index: the interface; nothing happens if it is gone, or has none.
    :raises OSError: if the kernel refuses.
    """
    request = struct.pack(
        _MESSAGE,
        struct.calcsize(_MESSAGE),
        _RTM_DELQDISC,
        _NLM_F_REQUEST | _NLM_F_ACK,
        1,
        0,
        socket.AF_UNSPEC,
        index,
        _INGRESS_HANDLE,
        _TC_H_INGRESS,
        0,
    )
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as opened:
        opened.send(request)
        *_, number = struct.unpack_from(_ERROR, opened.recv(4096))
    if number and -number not in _SETTLED:
        raise OSError(-number, f"network: interface {index}: its redirection stays: {os.strerror(-number)}")


def remove_ingress_in(path: str, *, number: int, index: int) -> None:
    """Like :func:`remove_ingress`, in a namespace that may be gone; the calling process stays in its own.

    :param path: the former path of the namespace.
    :param number: its inode number; nothing happens if another one is there now.
    :param index: the interface.
    :raises OSError: if the kernel refuses.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - slow to import, and rarely needed

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a FIFO by now
    except FileNotFoundError:
        return
    try:
        if os.fstat(descriptor).st_ino != number:
            return

        def enter_and_remove() -> None:
            kernel.enter_network_namespace(descriptor)
            remove_ingress(index)

        with ThreadPoolExecutor(max_workers=1) as executor:
            executor.submit(enter_and_remove).result()
    finally:
        os.close(descriptor)

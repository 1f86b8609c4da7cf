"""The agent's virtio-serial port: one byte stream, one host connection after another."""

from __future__ import annotations

import _socket
import _thread
import fcntl
import os
import select

from guest.agent import files
from guest.agent.console import log
from guest.agent.ttrpc import Connection
from proto.extensions import SERIAL_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ttrpc import Server

_PORT_CLASS = "/sys/class/virtio-ports"
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_EVENTS = 1
_MESSAGE = 8192

_changed = _thread.allocate_lock()


class _Stream:
    """The port while the host is connected to its other end."""

    __slots__ = ("_fd", "_readable", "_writable")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._readable = select.poll()
        self._readable.register(fd, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)

    def read(self, size: int) -> bytes:
        while True:
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                self._readable.poll()

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # The port would keep the answer for the next host, which has not asked for it.
                if self._writable.poll()[0][1] & select.POLLHUP:
                    raise BrokenPipeError("the host has disconnected") from None


def listen(server: Server) -> None:
    """Serve the port on a thread as soon as the machine has it.

    :param server: the services on offer.
    """
    _thread.start_new_thread(_serve, (server,))


def port_changed() -> None:
    """Wake the listener; the signal loop calls this on SIGIO."""
    try:
        _changed.release()
    except RuntimeError:
        # No host was waiting.
        return


def _serve(server: Server) -> None:
    fd = _open_port()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    while True:
        _await_host(fd)
        log("serial: host connected")
        Connection(_Stream(fd), server).serve()


def _open_port() -> int:
    """Wait for the port: the host names its ports some time after the driver is loaded."""
    events = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_DGRAM, _NETLINK_KOBJECT_UEVENT)
    events.bind((0, _KERNEL_EVENTS))
    try:
        while (port := _find_port()) is None:
            while b"SUBSYSTEM=virtio-ports" not in events.recv(_MESSAGE):
                pass
    finally:
        events.close()
    return os.open(f"/dev/{port}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _find_port() -> str | None:
    if not files.exists(_PORT_CLASS):
        return None
    for port in os.listdir(_PORT_CLASS):
        try:
            name = files.read(f"{_PORT_CLASS}/{port}/name")
        except FileNotFoundError:
            # The console's port has no name.
            continue
        if name.strip() == SERIAL_PORT:
            return port
    return None


def _await_host(fd: int) -> None:
    # Without a host, the port is at its end, and only SIGIO announces a host.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    _changed.acquire(blocking=False)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    while any(events & select.POLLHUP for _fd, events in poll.poll(0)):
        _changed.acquire()
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)

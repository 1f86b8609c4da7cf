"""The two ways the host reaches the agent: vsock port 1024, and the virtio-serial port ``hako.agent``."""

from __future__ import annotations

import _socket
import _thread
import fcntl
import os
import select

from guest.agent import files
from guest.agent.console import log
from guest.agent.ttrpc import Connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ttrpc import Server

PORT = 1024
_ANY_CID = 0xFFFFFFFF
_PORT_NAME = "hako.agent"
_PORT_CLASS = "/sys/class/virtio-ports"


class _Stream:
    """A connected vsock socket."""

    __slots__ = ("_fd", "_socket")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        os.close(self._fd)


class _SerialPort:
    """The virtio-serial port while the host is connected to its other end."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


def listen_vsock(server: Server) -> bool:
    """Accept connections on vsock port 1024, each served by a thread.

    :param server: the services on offer.
    :returns: False if the machine has no vsock device.
    :raises OSError: if the port is taken.
    """
    try:
        listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    except OSError:
        return False
    listener.bind((_ANY_CID, PORT))
    listener.listen(16)
    _thread.start_new_thread(_accept, (listener, server))
    return True


def _accept(listener: _socket.socket, server: Server) -> None:
    while True:
        fd, _address = listener._accept()  # noqa: SLF001  the wrapper module costs start-up time
        _thread.start_new_thread(_serve_stream, (_Stream(fd), server))


def _serve_stream(stream: _Stream, server: Server) -> None:
    Connection(stream, server).serve()
    stream.close()


def listen_serial(server: Server) -> bool:
    """Serve the virtio-serial port named ``hako.agent``, one host connection after another.

    :param server: the services on offer.
    :returns: False if there is no such port.
    :raises OSError: if the port cannot be opened.
    """
    try:
        ports = os.listdir(_PORT_CLASS)  # noqa: PTH208  pathlib costs start-up time
    except FileNotFoundError:
        return False
    for port in ports:
        try:
            name = files.read(f"{_PORT_CLASS}/{port}/name")
        except FileNotFoundError:  # the port of the console has no name
            continue
        if name.strip() == _PORT_NAME:
            fd = os.open(f"/dev/{port}", os.O_RDWR | os.O_CLOEXEC)
            _thread.start_new_thread(_serve_serial, (fd, server))
            return True
    return False


_changed = _thread.allocate_lock()


def port_changed() -> None:
    """Wake the serial listener; the signal loop calls this on SIGIO."""
    try:
        _changed.release()
    except RuntimeError:
        # Nobody was waiting.
        return


def _serve_serial(fd: int, server: Server) -> None:
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    while True:
        _await_host(fd)
        log("serial: host connected")
        Connection(_SerialPort(fd), server).serve()


def _await_host(fd: int) -> None:
    # Without a host the port is at its end, and only SIGIO tells of the host's coming.
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    _changed.acquire(blocking=False)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    while any(events & select.POLLHUP for _fd, events in poll.poll(0)):
        _changed.acquire()
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)

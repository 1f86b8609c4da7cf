"""The load program of the data paths: the same on both sides of a comparison.

It runs in containers, in bare machines and on the host. It reads one order per line and answers with how many
seconds the work took. It may import only modules that are built into Python's interpreter, because the guest
has no others.
"""

import _socket
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READY, TOOK, FAILED = "ready", "= ", "! "
SERVE = "serve"
PORT = 5201
MTU = 1400

_BLOCK = bytes(1 << 20)
_PAGE = bytes(4096)
_SMALL = bytes(1024)
_FILES_PER_DIRECTORY = 100
_DATAGRAM_BYTES = MTU - 28  # an IPv4 header and one of UDP
_WINDOW = 32
"""How many datagrams are on their way at once: fewer than a socket's buffer holds, so that none is lost."""
_OUT, _IN, _ECHO, _LAST = b"o", b"i", b"e", b"l"
_ORDER_BYTES = 16
_TIMEOUT_S = 20.0


def write(path: str, size: str) -> float:
    """Write a device, or a new file, in blocks of 1 MiB, and flush it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    began_s = time.monotonic()
    for _ in range(int(size) // len(_BLOCK)):
        os.write(file, _BLOCK)
    os.fsync(file)
    return _closed(file, began_s)


def read(path: str, size: str) -> float:
    """Read a file or device that is not in this machine's memory, in blocks of 1 MiB."""
    file = _forgotten(path)
    room = [memoryview(bytearray(_BLOCK))]
    began_s = time.monotonic()
    for _ in range(int(size) // len(_BLOCK)):
        os.readv(file, room)
    return _closed(file, began_s)


def random_write(path: str, size: str, count: str) -> float:
    """Write blocks of 4 KiB at random places outside this machine's memory, and flush them."""
    file = _forgotten(path)
    offsets = _offsets(int(size), int(count))
    began_s = time.monotonic()
    for offset in offsets:
        os.pwrite(file, _PAGE, offset)
    os.fsync(file)
    return _closed(file, began_s)


def random_read(path: str, size: str, count: str) -> float:
    """Read blocks of 4 KiB all over a file or device that is not in this machine's memory."""
    file = _forgotten(path)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    offsets = _offsets(int(size), int(count))
    began_s = time.monotonic()
    for offset in offsets:
        os.pread(file, len(_PAGE), offset)
    return _closed(file, began_s)


def tree(path: str, count: str) -> float:
    """Make a tree of files of 1 KiB as an unpacked archive leaves it, and remove it."""
    directories = [f"{path}/tree-{number}" for number in range(int(count) // _FILES_PER_DIRECTORY)]
    began_s = time.monotonic()
    for directory in directories:
        os.mkdir(directory)
        for number in range(_FILES_PER_DIRECTORY):
            file = os.open(f"{directory}/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(file, _SMALL)
            os.fchmod(file, 0o644)
            os.utime(file, (0, 0))
            os.close(file)
    for directory in directories:
        for name in os.listdir(directory):
            os.unlink(f"{directory}/{name}")
        os.rmdir(directory)
    return time.monotonic() - began_s


def tcp_out(host: str, size: str) -> float:
    """Send bytes over a connection until the other end has them all."""
    connection = _connected(host)
    began_s = time.monotonic()
    _order(connection, _OUT, size)
    for _ in range(int(size) // len(_BLOCK)):
        connection.sendall(_BLOCK)
    _receive(connection, 1)
    return _hung_up(connection, began_s)


def tcp_in(host: str, size: str) -> float:
    """Have the other end of a connection send bytes."""
    connection = _connected(host)
    began_s = time.monotonic()
    _order(connection, _IN, size)
    _receive(connection, int(size))
    return _hung_up(connection, began_s)


def tcp_trips(host: str, count: str) -> float:
    """Send a byte over a connection and wait until it comes back, again and again."""
    connection = _connected(host)
    began_s = time.monotonic()
    _order(connection, _ECHO, count)
    for _ in range(int(count)):
        connection.sendall(_ECHO)
        _receive(connection, 1)
    return _hung_up(connection, began_s)


def udp_out(host: str, count: str) -> float:
    """Send windows of datagrams, each after the other end has the one before."""
    connection = _connected(host, _socket.SOCK_DGRAM)
    middle, last = (mark.ljust(_DATAGRAM_BYTES) for mark in (_OUT, _LAST))
    began_s = time.monotonic()
    for _ in range(int(count) // _WINDOW):
        for _ in range(_WINDOW - 1):
            connection.send(middle)
        connection.send(last)
        connection.recv(_DATAGRAM_BYTES)
    return _hung_up(connection, began_s)


def udp_in(host: str, count: str) -> float:
    """Have the other end send windows of datagrams, each after the one before has come."""
    connection = _connected(host, _socket.SOCK_DGRAM)
    began_s = time.monotonic()
    for _ in range(int(count) // _WINDOW):
        connection.send(_IN)
        for _ in range(_WINDOW):
            connection.recv(_DATAGRAM_BYTES)
    return _hung_up(connection, began_s)


def udp_trips(host: str, count: str) -> float:
    """Send a datagram and wait until it comes back, again and again."""
    connection = _connected(host, _socket.SOCK_DGRAM)
    began_s = time.monotonic()
    for _ in range(int(count)):
        connection.send(_ECHO)
        connection.recv(1)
    return _hung_up(connection, began_s)


WORK: "dict[str, Callable[..., float]]" = {
    work.__name__: work
    for work in (
        *(write, read, random_write, random_read, tree),
        *(tcp_out, tcp_in, tcp_trips, udp_out, udp_in, udp_trips),
    )
}


def serve() -> None:
    """Be the other end of the network; this never returns."""
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    listener.bind(("", PORT))
    listener.listen(4)
    datagrams = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    datagrams.bind(("", PORT))
    poll = select.poll()
    for each in (listener, datagrams):
        poll.register(each.fileno(), select.POLLIN)
    _say(READY)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == datagrams.fileno():
                _serve_datagram(datagrams)
            else:
                _accept(listener)


def _accept(listener: _socket.socket) -> None:
    descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - what accept calls
    connection = _socket.socket(fileno=descriptor)
    try:
        _serve_connection(connection)
    except OSError as error:
        _say(f"{FAILED}{error}")
    connection.close()


def _serve_connection(connection: _socket.socket) -> None:
    connection.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    order = _receive(connection, _ORDER_BYTES)
    amount = int(order[1:])
    if order[:1] == _OUT:
        _receive(connection, amount)
        connection.sendall(_OUT)
    elif order[:1] == _IN:
        for _ in range(amount // len(_BLOCK)):
            connection.sendall(_BLOCK)
    else:
        for _ in range(amount):
            connection.sendall(_receive(connection, 1))


def _serve_datagram(datagrams: _socket.socket) -> None:
    data, sender = datagrams.recvfrom(_DATAGRAM_BYTES)
    if data[:1] == _IN:
        for _ in range(_WINDOW):
            datagrams.sendto(_BLOCK[:_DATAGRAM_BYTES], sender)
    elif data[:1] in {_ECHO, _LAST}:
        datagrams.sendto(data[:1], sender)


def _connected(host: str, kind: int = _socket.SOCK_STREAM) -> _socket.socket:
    connection = _socket.socket(_socket.AF_INET, kind)
    connection.settimeout(_TIMEOUT_S)
    connection.connect((host, PORT))
    if kind == _socket.SOCK_STREAM:
        connection.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    return connection


def _order(connection: _socket.socket, what: bytes, amount: str) -> None:
    connection.sendall((what + amount.encode()).ljust(_ORDER_BYTES))


def _receive(connection: _socket.socket, size: int) -> bytes:
    """Receive some bytes; return the last that came at once."""
    room = memoryview(bytearray(min(size, len(_BLOCK))))
    while size:
        count = connection.recv_into(room[: min(size, len(room))])
        if not count:
            raise OSError("the other end has hung up")
        size -= count
    return bytes(room[:count])


def _hung_up(connection: _socket.socket, began_s: float) -> float:
    took_s = time.monotonic() - began_s
    connection.close()
    return took_s


def _closed(file: int, began_s: float) -> float:
    took_s = time.monotonic() - began_s
    os.close(file)
    return took_s


def _forgotten(path: str) -> int:
    file = os.open(path, os.O_RDWR)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def _offsets(size: int, count: int) -> list[int]:
    """Choose places in a file: the same ones each time."""
    offsets, state = [], 1
    for _ in range(count):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF  # the example of a generator in C's standard
        offsets.append((state >> 8) % (size // len(_PAGE)) * len(_PAGE))
    return offsets


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    """Serve, or carry out orders until there are no more."""
    if sys.argv[1:] == [SERVE]:
        serve()
    _say(READY)
    while line := os.read(0, 4096):
        name, *arguments = line.decode().split()
        try:
            _say(f"{TOOK}{WORK[name](*arguments):.6f}")
        except OSError as error:
            _say(f"{FAILED}{error}")


if __name__ == "__main__":
    main()

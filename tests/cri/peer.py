"""One end of a conversation over TCP or UDP, in a container or on the host.

Run as a program in a container, whose Python has little more than sockets: ``serve PORT``, or what to do,
a port, an argument and hosts. Imported by the tests, which are the host's end. The server is asked in lines:
``echo WORDS``, ``whence`` (which address asks), ``hash SIZE`` (of what follows) and ``send SIZE``.
"""

from __future__ import annotations

import itertools
import socket
import struct
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


BLOCK = bytes(range(256)) * 256
TIMEOUT_S = 100.0


def new_digest() -> Any:
    """Return a SHA-256 digest; the module is imported only when needed, as that takes long in a guest."""
    import hashlib

    return hashlib.sha256()


def pattern(size: Any) -> Iterator[Any]:
    """Yield ``size`` bytes in which no block is like another."""
    for number in itertools.count():
        if size <= 0:
            return
        block = struct.pack("<Q", number) + BLOCK
        yield block[:size]
        size -= len(block)


def pattern_hash(size: Any) -> Any:
    """Return the SHA-256 digest of the pattern of a size."""
    digest = new_digest()
    for block in pattern(size):
        digest.update(block)
    return digest.hexdigest()


def receive_hash(connection: Any, size: Any) -> Any:
    """Return the SHA-256 digest of the next ``size`` bytes, or of all until the end if fewer."""
    digest = new_digest()
    while size > 0 and (chunk := connection.recv(min(size, 1 << 18))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def receive_line(connection: Any) -> Any:
    """Return the next line, without its end."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line.decode().strip()


def answer(connection: Any, address: Any) -> None:
    """Answer one request, and close the connection."""
    with connection:
        word, _, rest = receive_line(connection).partition(" ")
        if word == "echo":
            connection.sendall(f"{rest}\n".encode())
        elif word == "whence":
            connection.sendall(f"{address[0].removeprefix('::ffff:')}\n".encode())
        elif word == "hash":
            connection.sendall(f"{receive_hash(connection, int(rest))}\n".encode())
        elif word == "send":
            for block in pattern(int(rest)):
                connection.sendall(block)


def serve_datagrams(endpoint: Any) -> None:
    """Send every datagram back with a mark, forever."""
    while True:
        content, address = endpoint.recvfrom(65536)
        endpoint.sendto(b"back: " + content, address)


def serve(port: Any) -> None:
    """Serve TCP and UDP over IPv4 and IPv6, forever."""
    endpoint = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    endpoint.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    endpoint.bind(("::", port))
    threading.Thread(target=serve_datagrams, args=(endpoint,), daemon=True).start()
    with socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
    ) as server:
        print("serving", flush=True)
        while True:
            threading.Thread(target=answer, args=server.accept(), daemon=True).start()


def ask(host: Any, port: Any, request: Any) -> Any:
    """Return a server's answer to a request of one line."""
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"{request}\n".encode())
        return receive_line(connection)


def upload(host: Any, port: Any, size: Any) -> Any:
    """Send a pattern and return the digest that the server has of it."""
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"hash {size}\n".encode())
        for block in pattern(size):
            connection.sendall(block)
        return receive_line(connection)


def download(host: Any, port: Any, size: Any) -> Any:
    """Have the server send a pattern and return the digest of what arrives."""
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"send {size}\n".encode())
        return receive_hash(connection, size)


def datagram(host: Any, port: Any, size: Any) -> Any:
    """Return whether a datagram comes back whole from a server; a few may be lost."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    content = BLOCK[:size]
    with socket.socket(family, socket.SOCK_DGRAM) as endpoint:
        endpoint.settimeout(2.0)
        for _ in range(30):
            endpoint.sendto(content, (host, port))
            try:
                return endpoint.recvfrom(65536)[0] == b"back: " + content
            except TimeoutError:
                continue
    return False


def main(verb: Any, port: Any, rest: Any = "", *hosts: Any) -> None:
    """Run the command line's request, and print one word for each host."""
    if verb == "serve":
        serve(int(port))
    for host in hosts:
        if verb == "ask":
            print(ask(host, int(port), rest))
        elif verb == "greet":
            print(ask(host, int(port), "whence") if datagram(host, int(port), int(rest)) else "no datagram")
        else:
            print({"upload": upload, "download": download}[verb](host, int(port), int(rest)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The streams that containerd serves over WebSocket (RFC 6455): exec, attach and port forwarding.

Every message is binary, and its first byte names a channel. The subprotocol ``v4.channel.k8s.io`` gives a
process the channels 0 to 2 for its streams, 3 for how it ended and 4 for the size of its terminal; it gives
each forwarded port one for data and one for errors, which begin with the port in two bytes, lowest first.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from tests.cri.stack import inside
from tests.patience import patient

if TYPE_CHECKING:
    from pathlib import Path

STDIN, STDOUT, STDERR, ENDED, TERMINAL_SIZE = range(5)
TIMEOUT_S = patient(100.0)
_BINARY, _CLOSE, _PING, _PONG = 2, 8, 9, 10
SUBPROTOCOL = "v4.channel.k8s.io"


@dataclass(slots=True)
class Stream:
    """A connection to containerd's streaming server, from the network that it listens in.

    :param url: the answer of the runtime interface.
    :param network: the file of the network namespace.
    :raises ConnectionError: if the server does not speak the protocol.
    """

    url: str
    network: Path
    received: dict[int, bytes] = field(default_factory=dict, init=False)
    closed: bool = field(default=False, init=False)
    _socket: socket.socket = field(init=False)
    _buffer: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        """Connect and agree on the subprotocol."""
        parts = urlsplit(self.url)
        with inside(self.network):
            self._socket = socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {parts.path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
        )
        self._socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 ") or SUBPROTOCOL.encode() not in head:
            raise ConnectionError(f"{self.url}: {head.decode(errors='replace')}")

    def __enter__(self) -> Self:
        """Return the stream; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._send_frame(_CLOSE, b"")
        self._socket.close()

    def send(self, channel: int, content: bytes) -> None:
        """Send one message."""
        self._send_frame(_BINARY, bytes([channel]) + content)

    def resize(self, *, columns: int, rows: int) -> None:
        """Give the process's terminal a size."""
        self.send(TERMINAL_SIZE, json.dumps({"Width": columns, "Height": rows}).encode())

    def read_until(self, channel: int, wanted: bytes) -> bytes:
        """Return all that came through a channel so far, as soon as ``wanted`` is part of it.

        :raises ConnectionError: if the connection ends before.
        """
        while wanted not in self.received.get(channel, b""):
            if not self._receive():
                raise ConnectionError(f"{self.url}: it ended after {self.received}")
        return self.received[channel]

    def read_bytes(self, channel: int, size: int) -> bytes:
        """Return all that came through a channel so far, as soon as it is ``size`` bytes or more.

        :raises ConnectionError: if the connection ends before.
        """
        while len(self.received.get(channel, b"")) < size:
            if not self._receive():
                raise ConnectionError(f"{self.url}: it ended after {self.received}")
        return self.received[channel]

    def read_all(self) -> dict[int, bytes]:
        """Return all that comes, by channel, until the server ends the connection."""
        while self._receive():
            pass
        return self.received

    def exit_code(self) -> int:
        """Return the exit code that the server names when the process has ended."""
        while not self.received.get(ENDED):
            if not self._receive():
                raise ConnectionError(f"{self.url}: it ended without a status after {self.received}")
        status = json.loads(self.received[ENDED])
        if status["status"] == "Success":
            return 0
        causes = status["details"]["causes"]
        return next(int(cause["message"]) for cause in causes if cause["reason"] == "ExitCode")

    def _receive(self) -> bool:
        """Take the next message; tell whether the connection goes on."""
        if self.closed:
            return False
        try:
            kind, content = self._frame()
        except ConnectionResetError:
            kind, content = _CLOSE, b""
        if kind == _CLOSE:
            self.closed = True
        elif kind == _PING:
            self._send_frame(_PONG, content)
        elif content:
            channel = content[0]
            self.received[channel] = self.received.get(channel, b"") + content[1:]
        return not self.closed

    def _frame(self) -> tuple[int, bytes]:
        first, size = self._take(2)
        size &= 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", self._take(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._take(8))
        return first & 0x0F, self._take(size)

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _fill(self) -> None:
        chunk = self._socket.recv(1 << 18)
        if not chunk:
            raise ConnectionResetError
        self._buffer += chunk

    def _send_frame(self, kind: int, content: bytes) -> None:
        # A client must mask its messages; a mask of zeros changes nothing.
        size = len(content)
        if size < 126:
            head = struct.pack("!BB", 0x80 | kind, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", 0x80 | kind, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | kind, 0x80 | 127, size)
        self._socket.sendall(head + bytes(4) + content)

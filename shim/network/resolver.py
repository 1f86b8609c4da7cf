"""Forwards the guest's queries to Docker's resolver on a loopback address of the namespace.

In networks that a user has made, Docker writes ``nameserver 127.0.0.11`` into resolv.conf and answers there
for the names of containers. The guest sends its questions to that address over the first link, from its
localhost, and gets the answers the same way. A socket of the shim forwards them, because packets from a link
bypass the rules by which Docker redirects a process's queries to its own port.

Only UDP is forwarded: an answer that does not fit stays truncated. The layout of /proc/net/tcp is in Linux'
proc_net_tcp.rst; that of a message in RFC 1035, 4.1.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path

from shim.host import kernel
from shim.network.localhost import LOCALHOST, RESOLVER

log = logging.getLogger(__name__)

PORT = 53
_LISTENERS = Path("/proc/thread-self/net/tcp")
_LISTENS = "0A"
_ADDRESS = socket.inet_aton(RESOLVER)[::-1].hex().upper()
_OUR_OWN = f"{PORT:04X}"
_MESSAGE_BYTES = 1 << 16
_ID_BYTES, _HEADER_BYTES = 2, 12
_MAX_UNANSWERED = 1024


def is_there() -> bool:
    """Tell whether a process listens on the resolver's address in the calling thread's namespace."""
    for line in _LISTENERS.read_text(encoding="ascii").splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        if state == _LISTENS and local.startswith(f"{_ADDRESS}:") and not local.endswith(f":{_OUR_OWN}"):
            return True
    return False


class Forwarder:
    """Forwards queries in the namespace of the thread that makes this object.

    :raises OSError: if the resolver's port is taken.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as opened:
            self._guest = opened.enter_context(_bound(PORT))
            self._resolver = opened.enter_context(_bound(0))
            self._reach()
            opened.pop_all()
        self._unanswered: dict[int, tuple[bytes, tuple[str, int]]] = {}
        self._number = 0

    def _reach(self) -> None:
        # The kernel redirects everything from one port to the destination of the first packet, so only
        # another port reaches a restarted resolver.
        kernel.disconnect(self._resolver.fileno())
        self._resolver.connect((RESOLVER, PORT))

    def start(self) -> None:
        """Start to forward queries in the running loop."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._guest, self._ask)
        loop.add_reader(self._resolver, self._answer)

    def close(self) -> None:
        """Stop forwarding queries."""
        loop = asyncio.get_running_loop()
        for each in (self._guest, self._resolver):
            loop.remove_reader(each)
            each.close()

    def _ask(self) -> None:
        try:
            question, sender = self._guest.recvfrom(_MESSAGE_BYTES)
            # Only the guest sends from there; this drops one of our own queries that came back.
            if sender[0] != LOCALHOST or len(question) < _HEADER_BYTES:
                return
            # Two clients may have chosen the same number.
            self._number = (self._number + 1) % (1 << 8 * _ID_BYTES)
            if len(self._unanswered) >= _MAX_UNANSWERED:
                del self._unanswered[next(iter(self._unanswered))]
            self._unanswered[self._number] = (question[:_ID_BYTES], sender)
            self._send(self._number.to_bytes(_ID_BYTES, "big") + question[_ID_BYTES:])
        except OSError as error:  # the client asks again
            log.debug("network: a question of the guest: %s", error)

    def _send(self, question: bytes) -> None:
        try:
            self._resolver.send(question)
        except ConnectionRefusedError:  # the previous one was
            self._reach()
            self._resolver.send(question)

    def _answer(self) -> None:
        try:
            answer = self._resolver.recv(_MESSAGE_BYTES)
            asked = self._unanswered.pop(int.from_bytes(answer[:_ID_BYTES], "big"), None)
            if asked is not None:
                self._guest.sendto(asked[0] + answer[_ID_BYTES:], asked[1])
        except ConnectionRefusedError:
            self._reach()
        except OSError as error:  # as above
            log.debug("network: an answer of the resolver: %s", error)


def _bound(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        made.bind((RESOLVER, port))
    except OSError:
        made.close()
        raise
    return made

"""Netlink: converts messages and attributes to bytes and back, and exchanges them with the kernel.

Layout: include/uapi/linux/netlink.h; Documentation/userspace-api/netlink/intro.rst has the rules.
"""

from __future__ import annotations

import _socket
import os
import struct
import time

from guest.agent import files
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self, TypeVar

    Decoded = TypeVar("Decoded")
    Attributes = dict[int, bytes]

NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLM_F_DUMP_INTR, _NLM_F_ACK_TLVS = 0x10, 0x200
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_CODE = struct.Struct("=i")
_TYPE_MASK = 0x3FFF  # the two bits above it are flags
_ATTRIBUTE_MESSAGE = 1
_NETLINK_ROUTE, _SOL_NETLINK = 0, 270
_CAP_ACK, _EXT_ACK = 10, 11
_LINKS = 1  # a group of messages, see rtnetlink(7)
# The kernel's dumps fill 32 KiB at most.
_DATAGRAM = 1 << 16
_DUMP_ATTEMPTS = 8


def attribute(kind: int, data: bytes) -> bytes:
    """Encode an attribute.

    :param kind: its type.
    :param data: its value.
    :returns: the attribute, padded to four bytes.
    """
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data: bytes) -> Attributes:
    """Decode a run of attributes; of several with the same type, the last counts.

    :param data: the encoded run.
    :returns: values by type.
    :raises ValueError: if a length leaves the data.
    """
    found: Attributes = {}
    position = 0
    while position < len(data):
        if len(data) - position < _ATTRIBUTE.size:
            raise ValueError(f"{len(data) - position} bytes where an attribute should begin")
        size, kind = _ATTRIBUTE.unpack_from(data, position)
        if not _ATTRIBUTE.size <= size <= len(data) - position:
            raise ValueError(f"attribute of {size} bytes in the {len(data) - position} that are left")
        found[kind & _TYPE_MASK] = data[position + _ATTRIBUTE.size : position + size]
        position += size + -size % 4
    return found


def message(kind: int, flags: int, body: bytes, *, sequence: int) -> bytes:
    """Encode a message.

    :param kind: its type.
    :param flags: NLM_F_* bits.
    :param body: what follows the header.
    :param sequence: the number that the answer repeats.
    :returns: the whole message.
    """
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Decode the result of one receive from the kernel.

    :param datagram: one or more messages.
    :returns: type, flags, sequence number and body of each.
    :raises ValueError: if a length leaves the datagram.
    """
    position = 0
    while position < len(datagram):
        if len(datagram) - position < _HEADER.size:
            raise ValueError(f"{len(datagram) - position} bytes where a message should begin")
        size, kind, flags, sequence, _port = _HEADER.unpack_from(datagram, position)
        if not _HEADER.size <= size <= len(datagram) - position:
            raise ValueError(f"message of {size} bytes in the {len(datagram) - position} that are left")
        yield kind, flags, sequence, datagram[position + _HEADER.size : position + size]
        position += size + -size % 4


def refusal(body: bytes, *, flags: int) -> OSError | None:
    """Decode an acknowledgement.

    :param body: body of a message of type NLMSG_ERROR that repeats no more than the request's header.
    :param flags: flags of that message.
    :returns: the kernel's error, or None if there was none.
    :raises ValueError: if it is too short, or its attributes are malformed.
    """
    if len(body) < _CODE.size:
        raise ValueError(f"acknowledgement of {len(body)} bytes")
    number = -_CODE.unpack_from(body)[0]
    if number <= 0:
        return None
    cause = os.strerror(number)
    if flags & _NLM_F_ACK_TLVS:
        said = attributes(body[_CODE.size + _HEADER.size :]).get(_ATTRIBUTE_MESSAGE, b"")
        if said:
            cause = f"{cause}: {said.rstrip(bytes(1)).decode(errors='replace')}"
    return OSError(number, cause)


class NetlinkChannel:
    """A conversation with the kernel's routing subsystem, for one thread at a time; close it after use."""

    def __init__(self) -> None:
        self._socket = _socket.socket(
            _socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _NETLINK_ROUTE
        )
        for option in (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def change(self, kind: int, body: bytes, *, flags: int = 0) -> None:
        """Make, change or remove an object.

        :param kind: message type.
        :param body: the message.
        :param flags: NLM_F_CREATE and the like.
        :raises AgentError: if the answer is malformed.
        :raises OSError: if the kernel refuses; its text repeats the kernel's own.
        """
        self._send(kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, body)
        while not any(answer == _ERROR for answer, _flags, _body in self._receive()):
            pass

    def dump(self, kind: int, body: bytes, *, decode: Callable[[bytes], Decoded]) -> list[Decoded]:
        """List all objects of a kind.

        :param kind: message type.
        :param body: the header of that family of messages.
        :param decode: makes an object of a message's body, or raises ValueError.
        :returns: the objects.
        :raises AgentError: if an answer is malformed, or the objects change so often that no list is whole.
        :raises OSError: if the kernel refuses.
        """
        for _attempt in range(_DUMP_ATTEMPTS):
            self._send(kind, _NLM_F_REQUEST | _NLM_F_DUMP, body)
            answers = self._receive()
            while all(answer != _DONE for answer, _flags, _body in answers):
                answers += self._receive()
            if any(flags & _NLM_F_DUMP_INTR for _answer, flags, _body in answers):
                continue
            try:
                # A kernel that lacks an address family answers with all the others.
                return [
                    decode(content) for _answer, _flags, content in answers[:-1] if content[:1] == body[:1]
                ]
            except ValueError as error:
                raise _malformed(error) from error
        raise AgentError(f"netlink: list {kind}: changed during {_DUMP_ATTEMPTS} attempts; try again later")

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        self._socket.send(message(kind, flags, body, sequence=self._sequence))

    def _receive(self) -> list[tuple[int, int, bytes]]:
        """Receive type, flags and body of what answers the last request."""
        datagram = self._socket.recv(_DATAGRAM)
        try:
            answers = [
                (kind, flags, body)
                for kind, flags, sequence, body in messages(datagram)
                if sequence == self._sequence
            ]
            errors = [refusal(body, flags=flags) for kind, flags, body in answers if kind == _ERROR]
        except ValueError as error:
            raise _malformed(error) from error
        for refused in errors:
            if refused is not None:
                raise refused
        return answers


def await_carrier(link: str, *, timeout_s: float) -> None:
    """Wait until a link that is coming up is up; return at once if it does not exist or has no cable.

    :param link: its name.
    :param timeout_s: how long.
    """
    deadline = time.monotonic() + timeout_s
    news = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
    try:
        news.bind((0, _LINKS))
        while _is_down(link) and (left := deadline - time.monotonic()) > 0:
            news.settimeout(left)
            try:
                news.recv(_DATAGRAM)
            except TimeoutError:
                return
    finally:
        news.close()


def _is_down(link: str) -> bool:
    try:
        return files.read(f"/sys/class/net/{link}/operstate") == "down\n"
    except FileNotFoundError:
        return False


def _malformed(error: ValueError) -> AgentError:
    return AgentError(f"netlink: malformed answer: {error}; use another kernel")

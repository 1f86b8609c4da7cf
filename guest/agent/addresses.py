"""Network addresses: from the text in the host's requests to the bytes in the kernel's messages, and back."""

from __future__ import annotations

import _socket

from guest.agent.errors import InvalidArgument

_OCTETS = 6


def pack(text: str) -> bytes:
    """Read an IP address.

    :param text: IPv4 or IPv6, without zone or prefix.
    :returns: 4 or 16 bytes.
    :raises InvalidArgument: if it is neither.
    """
    try:
        return _socket.inet_pton(_socket.AF_INET6 if ":" in text else _socket.AF_INET, text)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"network: {text!r}: not an IP address; write it like 192.0.2.1") from error


def text_of(packed: bytes) -> str:
    """Write an IP address.

    :param packed: 4 or 16 bytes, or none.
    :returns: the usual text; empty for no address.
    """
    if not packed:
        return ""
    return _socket.inet_ntop(family_of(packed), packed)


def family_of(packed: bytes) -> int:
    """Tell the family of an address.

    :param packed: 4 or 16 bytes.
    :returns: AF_INET or AF_INET6.
    """
    return _socket.AF_INET if len(packed) == 4 else _socket.AF_INET6


def pack_network(text: str) -> tuple[bytes, int]:
    """Read a network.

    :param text: an address, with the prefix length behind a slash unless it is a whole address.
    :returns: the address and the prefix length.
    :raises InvalidArgument: if it is malformed.
    """
    address, slash, length = text.partition("/")
    packed = pack(address)
    return packed, prefix_length(length, packed) if slash else len(packed) * 8


def prefix_length(text: str, packed: bytes) -> int:
    """Read the length of a prefix.

    :param text: a decimal number.
    :param packed: the address that it belongs to.
    :returns: the length in bits.
    :raises InvalidArgument: if it is not a number, or is longer than the address.
    """
    longest = len(packed) * 8
    if not (text.isascii() and text.isdecimal()) or int(text) > longest:
        raise InvalidArgument(f"network: {text!r}: not a prefix length; write a number up to {longest}")
    return int(text)


def pack_mac(text: str) -> bytes:
    """Read a hardware address.

    :param text: six octets in hexadecimal with colons between.
    :returns: six bytes.
    :raises InvalidArgument: if it is malformed.
    """
    try:
        octets = [bytes.fromhex(part) for part in text.split(":")]
    except ValueError:
        octets = []
    if len(octets) != _OCTETS or any(len(octet) != 1 for octet in octets):
        raise InvalidArgument(f"network: {text!r}: not a hardware address; write it like 02:00:00:00:00:01")
    return b"".join(octets)


def link_local(mac: bytes) -> bytes:
    """Derive the IPv6 address that the kernel itself gives a link (RFC 4291, appendix A).

    :param mac: the link's hardware address.
    :returns: 16 bytes.
    """
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]

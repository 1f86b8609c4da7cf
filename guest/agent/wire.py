"""Protocol buffers by table: just the proto3 wire format, driven by tables made at image build time.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from guest.agent.errors import InvalidArgument

TYPE_CHECKING = False  # importing typing at start-up costs too much
if TYPE_CHECKING:
    from typing import Any

    Field = tuple[str, str, str, str]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LENGTH_DELIMITED = frozenset({"message", "map", "string", "bytes"})
_IMPLICIT: dict[str, Any] = {
    "bool": False,
    "bytes": b"",
    "int32": 0,
    "int64": 0,
    "string": "",
    "uint32": 0,
    "uint64": 0,
}
_MASK64 = (1 << 64) - 1


class Message:
    """A decoded message: one attribute for each field, under the contract's names.

    An absent sub-message or optional scalar is None; repeated fields are lists, maps are dicts.

    :param fields: attribute values.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # mutable


class Codec:
    """Encoder and decoder of the messages in a table.

    :param messages: full message name to field number to (name, kind, presence, inner message).
    """

    def __init__(self, messages: dict[str, dict[int, Field]]) -> None:
        self._messages = messages

    def new(self, name: str, /, **fields: Any) -> Message:
        """Make a message with every field at its default.

        :param name: full message name.
        :param fields: values that differ from the default.
        :returns: the message.
        """
        values: dict[str, Any] = {}
        for field, kind, presence, _inner in self._messages[name].values():
            if presence == "repeated":
                values[field] = {} if kind == "map" else []
            else:
                values[field] = None if presence == "explicit" else _IMPLICIT[kind]
        values.update(fields)
        return Message(values)

    def decode(self, name: str, data: bytes) -> Message:
        """Decode a message, skipping fields that the table does not know.

        :param name: full message name.
        :param data: its wire form.
        :returns: the message.
        :raises InvalidArgument: if the data is not such a message.
        """
        try:
            return self._decode(name, data)
        except (IndexError, ValueError) as error:
            raise InvalidArgument(f"decode: {name}: {error}; the sender is defective") from error

    def _decode(self, name: str, data: bytes) -> Message:
        message = self.new(name)
        self._merge(message, name, data)
        return message

    def _merge(self, message: Message, name: str, data: bytes) -> None:
        fields, values = self._messages[name], message.__dict__
        position, end = 0, len(data)
        while position < end:
            key, position = _varint(data, position)
            wire_type = key & 7
            raw: int | bytes | None
            if wire_type == _VARINT:
                raw, position = _varint(data, position)
            elif wire_type == _BYTES:
                size, position = _varint(data, position)
                raw = data[position : position + size]
                position += size
            elif wire_type in {_FIXED64, _FIXED32}:
                # No contract here has fixed-size fields.
                raw = None
                position += 8 if wire_type == _FIXED64 else 4
            else:
                raise ValueError(f"wire type {wire_type}")
            if position > end:
                raise ValueError("truncated")
            if key >> 3 == 0:
                raise ValueError("field number 0")
            field = fields.get(key >> 3)
            if field is not None and raw is not None:
                self._store(values, field, raw)

    def _store(self, values: dict[str, Any], field: Field, raw: Any) -> None:
        name, kind, presence, inner = field
        if isinstance(raw, int) is (kind in _LENGTH_DELIMITED):
            # A known field under another wire type counts as unknown, except packed numbers.
            if isinstance(raw, bytes) and presence == "repeated":
                values[name] += [_scalar(kind, number) for number in _unpacked(raw)]
        elif kind == "map":
            entry = self._decode(inner, raw)
            value = entry.value
            values[name][entry.key] = self.new(self._messages[inner][2][3]) if value is None else value
        elif kind == "message" and presence != "repeated" and values[name] is not None:
            self._merge(values[name], inner, raw)
        else:
            value = self._value(kind, inner, raw)
            if presence == "repeated":
                values[name].append(value)
            else:
                values[name] = value

    def _value(self, kind: str, inner: str, raw: Any) -> Any:
        if kind == "message":
            return self._decode(inner, raw)
        if kind == "string":
            return raw.decode()
        return raw if kind == "bytes" else _scalar(kind, raw)

    def encode(self, name: str, message: Message) -> bytes:
        """Encode a message; fields with their implicit default are left out, present sub-messages are not.

        :param name: full message name.
        :param message: its content.
        :returns: the wire form.
        """
        parts: list[bytes] = []
        values = message.__dict__
        for number, (field, kind, presence, inner) in self._messages[name].items():
            value = values[field]
            if presence == "repeated":
                if value:
                    self._encode_repeated(parts, number, kind, inner, value)
            elif value is not None and (presence == "explicit" or value != _IMPLICIT[kind]):
                self._encode_one(parts, number, kind, inner, value)
        return b"".join(parts)

    def encode_up_to(self, name: str, message: Message, size: int) -> bytes:
        """Encode a message except for the content of its last field; the content then follows without a copy.

        :param name: full message name; its last field is of bytes.
        :param message: its content; the last field is empty.
        :param size: how many bytes will follow.
        :returns: the wire form up to there.
        """
        if not size:
            return self.encode(name, message)
        last = max(self._messages[name])
        return self.encode(name, message) + _to_varint(last << 3 | _BYTES) + _to_varint(size)

    def _encode_repeated(self, parts: list[bytes], number: int, kind: str, inner: str, value: Any) -> None:
        if kind == "map":
            for key, item in value.items():
                self._encode_one(parts, number, "message", inner, Message({"key": key, "value": item}))
        elif kind in _LENGTH_DELIMITED:
            for item in value:
                self._encode_one(parts, number, kind, inner, item)
        else:
            packed = b"".join(_to_varint(int(item)) for item in value)
            parts += (_to_varint(number << 3 | _BYTES), _to_varint(len(packed)), packed)

    def _encode_one(self, parts: list[bytes], number: int, kind: str, inner: str, value: Any) -> None:
        if kind == "message":
            content = self.encode(inner, value)
        elif kind == "string":
            content = value.encode()
        elif kind == "bytes":
            content = value
        else:
            parts += (_to_varint(number << 3), _to_varint(int(value)))
            return
        parts += (_to_varint(number << 3 | _BYTES), _to_varint(len(content)), content)


def _scalar(kind: str, raw: int) -> bool | int:
    if kind == "bool":
        return raw != 0
    if kind == "uint32":
        return raw & 0xFFFFFFFF
    if kind == "int32":
        raw &= 0xFFFFFFFF
        return raw - (1 << 32) if raw >> 31 else raw
    if kind == "int64" and raw >> 63:
        return raw - (1 << 64)
    return raw


def _varint(data: bytes, position: int) -> tuple[int, int]:
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK64, position + 1
        shift += 7
        if shift >= 70:
            raise ValueError("varint longer than ten bytes")


def _unpacked(data: bytes) -> list[int]:
    numbers, position = [], 0
    while position < len(data):
        number, position = _varint(data, position)
        numbers.append(number)
    return numbers


def _to_varint(value: int) -> bytes:
    if 0 <= value < 0x80:
        return bytes((value,))
    value &= _MASK64
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)

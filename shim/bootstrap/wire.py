"""The few protobuf messages of ``start``, ``delete`` and ``-info``, decoded and encoded by hand.

Importing the protobuf runtime costs more than everything else ``start`` does. Encoding:
https://protobuf.dev/programming-guides/encoding/ ; fields: ``proto/containerd``.
"""

from __future__ import annotations

from shim.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_RUNTIME_OPTIONS = "runtimeoptions.v1.Options"
FEATURES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"


class NotProtobufError(ValueError):
    """The bytes are not a message of the expected kind."""


class RuntimeOptions(Record):
    """``runtimeoptions.v1.Options``: where the operator's configuration is, or the configuration itself."""

    config_path: str = ""
    config_body: str = ""


class BootstrapParams(Record):
    """``containerd.runtime.bootstrap.v1.BootstrapParams``: the input of ``start`` since containerd 2.3."""

    instance_id: str = ""
    namespace: str = ""
    log_level: int = 0
    ttrpc_address: str = ""
    grpc_address: str = ""
    binary: str = ""
    socket_dir: str = ""
    options: RuntimeOptions = RuntimeOptions()


def decode_params(data: bytes) -> BootstrapParams:
    """Decode the standard input of ``start`` from containerd 2.3 and later.

    An ``Any`` can be decoded, too, as its first field is a string: compare id and namespace with the flags.

    :param data: the whole input.
    :returns: the fields that ``start`` uses; runtime options found among the extensions.
    :raises NotProtobufError: if the input is not such a message.
    """
    fields: dict[str, object] = {}
    names = {
        1: "instance_id",
        5: "ttrpc_address",
        6: "grpc_address",
        7: "binary",
        9: "socket_dir",
    }
    for number, value in _fields(data):
        if number == 2:
            # In an Any, this field is a message, which never equals a namespace.
            fields["namespace"] = _message(value).decode(errors="replace")
        elif number in names:
            fields[names[number]] = _text(value)
        elif number == 3 and isinstance(value, int):
            fields["log_level"] = value - (1 << 64) if value >> 63 else value
        elif number == 8:
            for extension_number, extension in _fields(_message(value)):
                options = decode_options(_message(extension)) if extension_number == 1 else None
                if options is not None:
                    fields["options"] = options
    return BootstrapParams(**fields)  # type: ignore[arg-type]  # the table above pairs each field with its type


def decode_options(data: bytes) -> RuntimeOptions | None:
    """Decode an ``Any`` of runtime options.

    :param data: the serialized ``Any``.
    :returns: the options, or nothing if the ``Any`` holds another type (containerd also sends runc's).
    :raises NotProtobufError: if the bytes are not an ``Any``, or hold options that cannot be decoded.
    """
    type_url, value = "", b""
    for number, field in _fields(data):
        if number == 1:
            type_url = _text(field)
        elif number == 2:
            value = _message(field)
    if type_url.rpartition("/")[2] != _RUNTIME_OPTIONS:
        return None
    path, body = "", ""
    for number, field in _fields(value):
        if number == 2:
            path = _text(field)
        elif number == 3:
            body = _text(field)
    return RuntimeOptions(config_path=path, config_body=body)


def encode_result(*, version: int, address: str, protocol: str) -> bytes:
    """Encode ``containerd.runtime.bootstrap.v1.BootstrapResult``."""
    return _integer(1, version) + _string(2, address) + _string(3, protocol)


def encode_delete_response(*, exit_status: int, exited_at: float) -> bytes:
    """Encode ``containerd.task.v2.DeleteResponse`` without a pid.

    :param exit_status: the status containerd reports for the task.
    :param exited_at: seconds since the epoch.
    """
    seconds = int(exited_at)
    timestamp = _integer(1, seconds) + _integer(2, int((exited_at - seconds) * 1e9))
    return _integer(2, exit_status) + _bytes(3, timestamp)


def encode_runtime_info(*, name: str, version: str, features: str) -> bytes:
    """Encode ``containerd.types.RuntimeInfo``.

    :param name: the runtime's name in containerd's configuration.
    :param version: the version of Hako.
    :param features: the OCI features object as JSON.
    """
    return b"".join(
        (
            _string(1, name),
            _bytes(2, _string(1, version)),
            _bytes(4, _string(1, FEATURES_TYPE) + _string(2, features)),
        )
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        value: int | bytes
        if number == 0:
            raise NotProtobufError("field number 0")
        if wire_type == _VARINT:
            value, at = _varint(data, at)
        elif wire_type in {_BYTES, _FIXED64, _FIXED32}:
            if wire_type == _BYTES:
                length, at = _varint(data, at)
            else:
                length = 8 if wire_type == _FIXED64 else 4
            value = data[at : at + length]
            at += length
            if at > len(data):
                raise NotProtobufError("a field ends beyond the message")
        else:
            raise NotProtobufError(f"wire type {wire_type}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(10):
        if at + index >= len(data):
            raise NotProtobufError("a number ends beyond the message")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & ((1 << 64) - 1), at + index + 1
    raise NotProtobufError("a number is longer than ten bytes")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise NotProtobufError("a number where a message belongs")
    return value


def _text(value: int | bytes) -> str:
    try:
        return _message(value).decode()
    except UnicodeDecodeError as error:
        raise NotProtobufError("a string is not UTF-8") from error


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _integer(number: int, value: int) -> bytes:
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value


def _string(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())

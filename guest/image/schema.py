"""The agent's wire tables, made from protobuf descriptors, so that the guest needs no protobuf runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.descriptor import FieldDescriptor

from proto import ttrpc_pb2
from proto.kata import agent_pb2, health_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

Field = tuple[str, str, str, str]
"""Name, kind, presence (``implicit``, ``explicit`` or ``repeated``), and the inner message's full name."""
Methods = dict[str, dict[str, tuple[str, str]]]
"""Service name to method name to the full names of request and response."""

_KINDS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_ENUM: "int32",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_MESSAGE: "message",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def messages() -> dict[str, dict[int, Field]]:
    """Tabulate the agent's requests and responses, ttrpc's own messages and all that they contain.

    :returns: full message name to field number to field.
    :raises KeyError: if a contract uses a field type the agent's codec does not know.
    """
    table: dict[str, dict[int, Field]] = {}

    def add(message: Descriptor) -> None:
        if message.full_name in table:
            return
        fields = table[message.full_name] = {}
        for field in sorted(message.fields, key=lambda one: one.number):
            kind, inner = _KINDS[field.type], ""
            if field.message_type is not None:
                inner = field.message_type.full_name
                add(field.message_type)
                if field.message_type.GetOptions().map_entry:
                    kind = "map"
            presence = "explicit" if field.has_presence else "implicit"
            fields[field.number] = (field.name, kind, "repeated" if field.is_repeated else presence, inner)

    for name in ("Request", "Response"):
        add(ttrpc_pb2.DESCRIPTOR.message_types_by_name[name])
    for file in (agent_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                add(method.input_type)
                add(method.output_type)
    return table


def methods() -> Methods:
    """Tabulate the agent's services.

    :returns: service name to method name to request and response.
    """
    return {
        service.full_name: {
            method.name: (method.input_type.full_name, method.output_type.full_name)
            for method in service.methods
        }
        for file in (agent_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
    }


def source() -> str:
    """Write the tables as the Python module ``guest.agent.tables``.

    :returns: its source.
    """
    return f'"""Generated wire tables."""\nMESSAGES = {messages()!r}\nMETHODS = {methods()!r}\n'

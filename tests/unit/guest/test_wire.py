"""The agent's codec agrees with the protobuf runtime, which is the reference."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest.agent.errors import InvalidArgument
from guest.agent.wire import Codec, Message
from guest.image import schema
from proto import ttrpc_pb2
from proto.kata import agent_pb2, oci_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message as Reference

CODEC = Codec(schema.messages())
RANGES = {
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "uint32": (0, (1 << 32) - 1),
    "uint64": (0, (1 << 64) - 1),
}
MESSAGES = (
    ttrpc_pb2.Request,
    ttrpc_pb2.Response,
    agent_pb2.CreateContainerRequest,
    agent_pb2.CreateSandboxRequest,
    agent_pb2.StatsContainerResponse,
    agent_pb2.GuestDetailsResponse,
    agent_pb2.ReadStreamResponse,
    agent_pb2.MemAgentMemcgConfig,
    agent_pb2.CopyFileRequest,
    oci_pb2.Spec,
)


def values_of(kind: str, inner: str) -> st.SearchStrategy[Any]:
    if kind == "message":
        return st.deferred(lambda: contents_of(inner))
    if kind == "string":
        return st.text(max_size=8)
    if kind == "bytes":
        return st.binary(max_size=8)
    if kind == "bool":
        return st.booleans()
    low, high = RANGES[kind]
    return st.integers(low, high)


def contents_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field, kind, presence, inner in schema.messages()[name].values():
        if kind == "map":
            entry = schema.messages()[inner]
            value: st.SearchStrategy[Any] = st.dictionaries(
                st.text(max_size=4), values_of(entry[2][1], entry[2][3]), max_size=2
            )
        else:
            value = values_of(kind, inner)
            if presence == "repeated":
                value = st.lists(value, max_size=3)
        fields[field] = value
    return st.fixed_dictionaries({}, optional=fields)


def fill(reference: Reference, content: dict[str, Any]) -> None:
    """Put generated content into a message of the protobuf runtime."""
    for name, value in content.items():
        field = reference.DESCRIPTOR.fields_by_name[name]
        if is_map(field):
            for key, item in value.items():
                if isinstance(item, dict):
                    fill(getattr(reference, name)[key], item)
                else:
                    getattr(reference, name)[key] = item
        elif field.message_type is None:
            if field.is_repeated:
                getattr(reference, name).extend(value)
            else:
                setattr(reference, name, value)
        elif field.is_repeated:
            for item in value:
                fill(getattr(reference, name).add(), item)
        else:
            getattr(reference, name).SetInParent()
            fill(getattr(reference, name), value)


def is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def same(ours: Message, reference: Reference) -> None:
    """Compare a message field by field with the protobuf runtime's."""
    for field in reference.DESCRIPTOR.fields:
        mine, theirs = getattr(ours, field.name), getattr(reference, field.name)
        if is_map(field):
            assert set(mine) == set(theirs)
            for key, item in theirs.items():
                if isinstance(mine[key], Message):
                    same(mine[key], item)
                else:
                    assert mine[key] == item
        elif field.is_repeated:
            assert len(mine) == len(theirs)
            for one, other in zip(mine, theirs, strict=True):
                if isinstance(one, Message):
                    same(one, other)
                else:
                    assert one == other
        elif field.has_presence and not reference.HasField(field.name):
            assert mine is None
        elif isinstance(mine, Message):
            same(mine, theirs)
        else:
            assert mine == theirs


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.DESCRIPTOR.full_name)
@settings(max_examples=25)
@given(data=st.data())
def test_messages_survive_a_round_trip_through_the_protobuf_runtime(
    kind: type[Reference], data: st.DataObject
) -> None:
    name = kind.DESCRIPTOR.full_name
    reference = kind()
    fill(reference, data.draw(contents_of(name)))
    ours = CODEC.decode(name, reference.SerializeToString())
    same(ours, reference)
    assert kind.FromString(CODEC.encode(name, ours)) == reference


@settings(max_examples=300)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_refused_or_survive_a_round_trip(data: bytes) -> None:
    name = "grpc.CreateContainerRequest"
    with contextlib.suppress(InvalidArgument):
        message = CODEC.decode(name, data)
        assert CODEC.decode(name, CODEC.encode(name, message)) == message


@pytest.mark.parametrize("payload", [b"", b"x", b"x" * 127, b"x" * 128, b"x" * 70_000])
def test_the_last_field_can_be_appended_to_an_encoded_message(payload: bytes) -> None:
    status = CODEC.new("ttrpc.Status", code=5, message="gone")
    response = CODEC.new("ttrpc.Response", status=status)
    encoded = CODEC.encode_up_to("ttrpc.Response", response, len(payload)) + payload
    expected = ttrpc_pb2.Response(payload=payload)
    expected.status.code, expected.status.message = 5, "gone"
    assert ttrpc_pb2.Response.FromString(encoded) == expected


@pytest.mark.parametrize(
    "unknown", [b"\xf8\x07\x05", b"\xf9\x07" + bytes(8), b"\xfa\x07\x03abc", b"\xfd\x07" + bytes(4)]
)
def test_unknown_fields_are_skipped(unknown: bytes) -> None:
    known = agent_pb2.StartContainerRequest(container_id="c").SerializeToString()
    message = CODEC.decode("grpc.StartContainerRequest", unknown + known + unknown)
    assert vars(message) == {"container_id": "c"}


def test_unpacked_numbers_are_read_like_packed_ones() -> None:
    packed = CODEC.decode("grpc.User", b"\x1a\x02\x05\x06")
    unpacked = CODEC.decode("grpc.User", b"\x18\x05\x18\x06")
    assert packed.AdditionalGids == unpacked.AdditionalGids == [5, 6]


def test_a_known_field_of_another_wire_type_counts_as_unknown() -> None:
    assert CODEC.decode("grpc.StartContainerRequest", b"\x08\x05").container_id == ""
    assert CODEC.decode("grpc.StartContainerRequest", b"\x09" + bytes(8)).container_id == ""


def test_a_present_empty_message_stays_present() -> None:
    present = CODEC.new("grpc.Linux", Resources=CODEC.new("grpc.LinuxResources"))
    assert CODEC.encode("grpc.Linux", present) == b"\x22\x00"
    assert CODEC.decode("grpc.Linux", b"\x22\x00").Resources is not None
    assert CODEC.decode("grpc.Linux", b"").Resources is None


def test_a_message_sent_in_two_parts_is_merged() -> None:
    first = agent_pb2.ExecProcessRequest(process=oci_pb2.Process(Args=["a"], Cwd="/x"))
    second = agent_pb2.ExecProcessRequest(process=oci_pb2.Process(Args=["b"], Terminal=True))
    whole = first.SerializeToString() + second.SerializeToString()
    same(CODEC.decode("grpc.ExecProcessRequest", whole), agent_pb2.ExecProcessRequest.FromString(whole))


@pytest.mark.parametrize(
    "broken",
    [
        b"\x0a\x05ab",
        b"\x0a",
        b"\xff\xff",
        b"\x0b",
        b"\x00\x00",
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\x0a\x01\xff",
    ],
    ids=["short", "no length", "open varint", "group", "field 0", "long varint", "not utf-8"],
)
def test_broken_data_is_refused(broken: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"grpc\.StartContainerRequest"):
        CODEC.decode("grpc.StartContainerRequest", broken)

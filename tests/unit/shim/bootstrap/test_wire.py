"""The hand-written codec agrees with protobuf."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.containerd import bootstrap_v1_pb2, runtime_options_pb2, task_v2_pb2, types_pb2
from shim.bootstrap import wire as bootstrap_wire
from shim.bootstrap.wire import BootstrapParams, NotProtobufError, RuntimeOptions

LEVELS = st.sampled_from(bootstrap_v1_pb2.LogLevel.values())
TEXTS = {name: st.text() for name in ("instance_id", "namespace", "socket_dir")}
# These fields have shorter names in the record.
RENAMED = {
    "ttrpc_address": "containerd_ttrpc_address",
    "grpc_address": "containerd_grpc_address",
    "binary": "containerd_binary",
}


@given(st.fixed_dictionaries({**TEXTS, **dict.fromkeys(RENAMED, st.text()), "log_level": LEVELS}), st.text())
def test_parameters_are_read_as_protobuf_reads_them(fields: dict[str, Any], version: str) -> None:
    sent = bootstrap_v1_pb2.BootstrapParams(
        containerd_version=version, **{RENAMED.get(name, name): value for name, value in fields.items()}
    )
    assert bootstrap_wire.decode_params(sent.SerializeToString()) == BootstrapParams(**fields)


@given(st.text(), st.text())
def test_options_are_found_among_the_extensions(path: str, body: str) -> None:
    sent = bootstrap_v1_pb2.BootstrapParams()
    other = sent.extensions.add().value
    other.type_url = "containerd.runc.v1.Options"
    other.value = b"\xff"
    extension = sent.extensions.add().value
    extension.type_url = "type.googleapis.com/runtimeoptions.v1.Options"
    extension.value = runtime_options_pb2.Options(
        type_url="ignored", config_path=path, config_body=body.encode()
    ).SerializeToString()
    assert bootstrap_wire.decode_params(sent.SerializeToString()).options == RuntimeOptions(
        config_path=path, config_body=body
    )


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(NotProtobufError):
        assert isinstance(bootstrap_wire.decode_params(data), BootstrapParams)
    with contextlib.suppress(NotProtobufError):
        assert isinstance(bootstrap_wire.decode_options(data), RuntimeOptions | None)


def test_another_runtimes_options_may_contain_any_bytes() -> None:
    url = b"containerd.runc.v1.Options"
    value = b"\x28\xff\xff\x03"  # a varint that is not valid UTF-8
    data = bytes([10, len(url)]) + url + bytes([18, len(value)]) + value
    assert bootstrap_wire.decode_params(data).instance_id == url.decode()
    assert bootstrap_wire.decode_options(data) is None


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x05ab",
        b"\x08",
        b"\x08" + b"\xff" * 11,
        b"\x00\x00",
        b"\x0b",
        b"\x0a\x01\xff",
        b"\x09abc",
    ],
    ids=["no length", "short", "no number", "long number", "field 0", "group", "not UTF-8", "short fixed"],
)
def test_a_broken_message_is_refused(data: bytes) -> None:
    with pytest.raises(NotProtobufError):
        bootstrap_wire.decode_params(data)


def test_fields_of_later_versions_are_skipped() -> None:
    later = b"\xa0\x06\x01" + b"\xa9\x06" + b"x" * 8 + b"\xb2\x06\x01x" + b"\xbd\x06" + b"x" * 4
    assert bootstrap_wire.decode_params(later + b"\x0a\x01a").instance_id == "a"


def test_protobuf_decodes_a_result() -> None:
    encoded = bootstrap_wire.encode_result(version=2, address="unix:///" + "a" * 200, protocol="ttrpc")
    assert bootstrap_v1_pb2.BootstrapResult.FromString(encoded) == bootstrap_v1_pb2.BootstrapResult(
        version=2, address="unix:///" + "a" * 200, protocol="ttrpc"
    )


def test_protobuf_decodes_a_delete_response() -> None:
    encoded = bootstrap_wire.encode_delete_response(exit_status=137, exited_at=1_700_000_000.25)
    response = task_v2_pb2.DeleteResponse.FromString(encoded)
    assert (response.pid, response.exit_status) == (0, 137)
    assert (response.exited_at.seconds, response.exited_at.nanos) == (1_700_000_000, 250_000_000)


def test_protobuf_decodes_the_runtime_information() -> None:
    features = json.dumps({"ociVersionMin": "1.0.0"})
    encoded = bootstrap_wire.encode_runtime_info(name="n", version="1", features=features)
    information = types_pb2.RuntimeInfo.FromString(encoded)
    assert (information.name, information.version.version) == ("n", "1")
    assert information.features.type_url == bootstrap_wire.FEATURES_TYPE
    assert information.features.value == features.encode()

"""Any standard input of ``start``, any bundle and any command line is understood or refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto.containerd import bootstrap_v1_pb2, runtime_options_pb2
from shim import identifiers
from shim.bootstrap import command_line, grouping
from shim.bootstrap.command_line import CommandLine
from shim.bootstrap.dialect import identify_caller
from shim.bootstrap.wire import NotProtobufError, decode_options, decode_params
from shim.refusal import Refusal
from tests.fuzz.material import LONG, bent, json_values, messages, texts

if TYPE_CHECKING:
    from typing import Any

    import pytest


CASES = settings().max_examples

LINE = CommandLine(namespace="default", id="box", address="/run/containerd/containerd.sock")


def parameters(**fields: Any) -> bootstrap_v1_pb2.BootstrapParams:
    sent = bootstrap_v1_pb2.BootstrapParams(instance_id="box", namespace="default", **fields)
    extension = sent.extensions.add().value
    extension.type_url = "runtimeoptions.v1.Options"
    extension.value = runtime_options_pb2.Options(
        config_path="/etc/x", config_body=b"x = 1"
    ).SerializeToString()
    return sent


def with_ids(message: Any) -> bytes:
    message.instance_id, message.namespace = "box", "default"
    return bytes(message.SerializeToString())


valid = st.one_of(
    messages(bootstrap_v1_pb2.BootstrapParams.DESCRIPTOR).map(with_ids),
    st.just(parameters(socket_dir="/run/s").SerializeToString()),
    st.just(parameters().extensions[0].value.SerializeToString()),
)
inputs = st.one_of(st.binary(max_size=80), valid, bent(valid))


@settings(max_examples=3 * CASES)
@given(data=inputs)
@example(data=parameters(socket_dir="/run/a\0b").SerializeToString())
@example(data=parameters(containerd_binary="a\0b").SerializeToString())
@example(data=parameters(containerd_ttrpc_address="a\0b").SerializeToString())
def test_any_standard_input(data: bytes) -> None:
    for decode in (decode_params, decode_options):
        try:
            decode(data)
        except NotProtobufError as error:
            assert str(error)  # noqa: PT017 - a refusal is one of the two right outcomes
    try:
        params = identify_caller(data, LINE).params
    except Refusal as refusal:
        assert str(refusal).startswith("start: standard input: ")  # noqa: PT017 - as above
        return
    for text in (params.ttrpc_address, params.grpc_address, params.binary, params.socket_dir):
        assert "\0" not in text


@settings(max_examples=CASES)
@given(
    text=st.one_of(st.text(max_size=40), json_values.map(lambda value: json.dumps({"annotations": value})))
)
@example(text="[" * 5000)
@example(text='{"annotations": {"io.kubernetes.cri.sandbox-id": "../../x"}}')
@example(text='{"annotations": {"io.kubernetes.cri.sandbox-id": ["x"]}}')
def test_any_bundle_gives_a_safe_group_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    bundle = tmp_path_factory.getbasetemp()
    (bundle / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    try:
        group = grouping.group_of(str(bundle), "box")
        identifiers.check_identifier(group, phase="start", what="group")
    except Refusal as refusal:
        assert str(refusal).startswith("start: ")  # noqa: PT017 - as above
        return
    assert "/" not in group
    assert group not in {"", ".", ".."}


flags = st.sampled_from(
    [
        "-id",
        "--id",
        "-namespace",
        "-id=box",
        "-debug",
        "-debug=x",
        "-v",
        "--",
        "-",
        "start",
        "-x",
        "-bundle",
        LONG,
    ]
)


@settings(max_examples=CASES)
@given(arguments=st.lists(st.one_of(flags, texts), max_size=6))
def test_any_command_line(arguments: list[str]) -> None:
    try:
        command_line.parse(arguments)
    except Refusal as refusal:
        assert str(refusal).startswith("command line: ")  # noqa: PT017 - as above

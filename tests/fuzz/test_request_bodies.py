"""Every service answers any request body as the contract says, over both transports."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.containerd import task_v2_pb2, task_v3_pb2
from tests.fuzz.material import bent, messages
from tests.fuzz.peers import ANSWER_TIMEOUT_S, assert_contract

if TYPE_CHECKING:
    from typing import Any


CASES = settings().max_examples

_SERVICES = [
    task_v3_pb2.DESCRIPTOR.services_by_name["Task"],
    task_v2_pb2.DESCRIPTOR.services_by_name["Task"],
]
_METHODS = {(service.full_name, method.name): method for service in _SERVICES for method in service.methods}
_WAIT_S = 0.05


@st.composite
def calls(draw: Any) -> Any:
    """A service, a method of it, and a body that may or may not be its request."""
    service, name = draw(st.sampled_from(sorted(_METHODS)))
    method = _METHODS[service, name]
    valid = messages(method.input_type).map(lambda message: message.SerializeToString())
    return service, name, draw(st.one_of(valid, bent(valid), st.binary(max_size=60)))


@settings(max_examples=10 * CASES)
@given(call=calls())
def test_over_ttrpc(shim: Any, call: Any) -> None:
    service, method, payload = call
    shim.ensure_running()
    with shim.connect() as peer:
        peer.call(method, payload, service=service, timeout_s=_WAIT_S if method == "Wait" else 0)
    shim.assert_serves()


@settings(max_examples=5 * CASES)
@given(call=calls())
def test_over_grpc(shim: Any, call: Any) -> None:
    service, method, payload = call
    shim.ensure_running()
    timeout_s = _WAIT_S if method == "Wait" else ANSWER_TIMEOUT_S
    answer = shim.channel.unary_unary(f"/{service}/{method}").future(payload, timeout=timeout_s)
    assert_contract(answer.code().value[0], answer.details())
    assert method == "Wait" or answer.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    shim.assert_serves()


# These services are grpc's own; grpc answers a body that it cannot parse with Unknown or Internal.
_TOOL_CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNKNOWN,
}
_TOOL_METHODS = {
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest.DESCRIPTOR,
    "/grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest.DESCRIPTOR,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (
        reflection_pb2.ServerReflectionRequest.DESCRIPTOR
    ),
}


@given(data=st.data(), path=st.sampled_from(sorted(_TOOL_METHODS)))
def test_the_services_for_tools(shim: Any, data: Any, path: str) -> None:
    valid = messages(_TOOL_METHODS[path]).map(lambda message: message.SerializeToString())
    payload = data.draw(st.one_of(valid, bent(valid), st.binary(max_size=60)))
    replies = shim.channel.stream_stream(path)(iter([payload]), timeout=ANSWER_TIMEOUT_S)
    with contextlib.suppress(grpc.RpcError):
        next(replies)
        replies.cancel()
    assert replies.code() in _TOOL_CODES
    shim.assert_serves()

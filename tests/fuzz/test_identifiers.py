"""An id that could name anything but one container is refused in one line, at every entry point."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import pytest

from proto.containerd import task_v3_pb2
from tests.fuzz.peers import TASK, assert_contract

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from tests.fuzz.peers import ServedShim


IDS = {
    "empty": "",
    "dot": ".",
    "two dots": "..",
    "separator": "a/b",
    "outside": "../../etc",
    "nul": "a\0b",
    "line": "a\nb",
    "space": "a b",
    "over-long": "x" * 77,
    "leading dash": "-rf",
    "not ascii": "é",
}
identifiers = pytest.mark.parametrize("identifier", IDS.values(), ids=IDS)


def refusals(shim: ServedShim, method: Any, request: Any) -> Iterator[Any]:
    """The answers to one request, over ttrpc and over gRPC."""
    with shim.connect() as peer:
        yield peer.call(method, request.SerializeToString())[:2]
    with pytest.raises(grpc.RpcError) as caught:
        shim.channel.unary_unary(f"/{TASK}/{method}")(request.SerializeToString())
    yield caught.value.code().value[0], caught.value.details()


@identifiers
def test_create_refuses(shim: Any, identifier: str) -> None:
    request = task_v3_pb2.CreateTaskRequest(id=identifier, bundle=str(shim.bundle))
    for code, message in refusals(shim, "Create", request):
        assert_contract(code, message)
        assert code == 3, message
        assert message.startswith("create: id")


@identifiers
def test_exec_refuses(shim: Any, identifier: str) -> None:
    shim.ensure_running()
    request = task_v3_pb2.ExecProcessRequest(id="box", exec_id=identifier)
    request.spec.value = json.dumps({"args": ["true"], "cwd": "/"}).encode()
    for code, message in refusals(shim, "Exec", request):
        assert_contract(code, message)
        assert code == 3, message
        assert message.startswith("exec: exec id")


def test_the_longest_id_is_taken(shim: Any) -> None:
    with shim.connect() as peer:
        request = task_v3_pb2.CreateTaskRequest(id="x" * 76, bundle=str(shim.bundle))
        assert peer.ask("Create", request) == 0
    shim.remove("x" * 76)

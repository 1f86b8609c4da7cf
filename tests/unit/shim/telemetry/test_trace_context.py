"""Of containerd's requests, those that make a sandbox or a container say whose spans a start belongs to."""

from __future__ import annotations

import pytest

from proto.containerd import task_v3_pb2
from shim.telemetry.trace_context import SANDBOX, TraceContexts

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"


def create(name: str) -> bytes:
    return task_v3_pb2.CreateTaskRequest(id=name).SerializeToString()


def test_the_first_request_counts_for_the_sandbox_and_each_for_its_container() -> None:
    contexts = TraceContexts()
    contexts.heed("Create", create("one"), [("traceparent", PARENT), ("tracestate", "a=b"), ("other", "x")])
    contexts.heed("Create", create("two"), [("traceparent", OTHER)])

    assert contexts.take(SANDBOX) == {"traceparent": PARENT, "tracestate": "a=b"}
    assert contexts.take("one") == {"traceparent": PARENT, "tracestate": "a=b"}
    assert contexts.take("two") == {"traceparent": OTHER}
    assert contexts.take("two") == {}
    contexts.heed("Create", create("three"), [("traceparent", OTHER)])
    assert contexts.take(SANDBOX) == {}


@pytest.mark.parametrize("method", ["CreateSandbox", "StartSandbox"])
def test_a_request_for_a_sandbox_counts_for_it(method: str) -> None:
    contexts = TraceContexts()
    contexts.heed(method, b"", [("traceparent", PARENT)])
    assert contexts.take(SANDBOX) == {"traceparent": PARENT}


@pytest.mark.parametrize(
    ("method", "payload", "headers"),
    [
        ("State", create("one"), [("traceparent", PARENT)]),
        ("Create", create("one"), []),
        ("Create", create("one"), [("traceparent", "00-no-01")]),
        ("Create", create("one"), [("traceparent", PARENT), ("tracestate", "a=" + "b" * 512)]),
        ("Create", b"\xff", [("traceparent", PARENT)]),
    ],
)
def test_other_requests_count_for_no_container(
    method: str, payload: bytes, headers: list[tuple[str, str]]
) -> None:
    contexts = TraceContexts()
    contexts.heed(method, payload, headers)
    assert contexts.take("one") == {}

"""Phases of a start become spans: with their times, below what containerd's requests name."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

from shim.host import releases
from shim.telemetry import spans

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BATCH: dict[str, Any] = {
    "endpoint": "",
    "attributes": {"hako.sandbox.id": "box"},
    "container": "box",
    "lane": "container box",
    "carried": {},
    "sandbox_carried": {},
    "phases": [
        ["shim", "sockets", 1.0, 1.5],
        ["shim", "ready", 1.5, 1.5],
        ["container box", "Create", 1.25, 2.0],
    ],
    "epoch_ns": 10**18,
    "failure": None,
    "sandbox_failure": None,
}
FAILURE = {"type": "InvalidArgument", "text": "create: no such path", "began_s": 1.25, "ended_s": 3.0}


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: dict[str, ReadableSpan] = {}

    def export(self, spans: Any) -> SpanExportResult:
        self.spans |= {span.name: span for span in spans}
        return SpanExportResult.SUCCESS


def sent(**changes: Any) -> dict[str, ReadableSpan]:
    kept = Kept()
    spans.send({**BATCH, **changes}, kept)
    return kept.spans


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def context_of(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def test_a_start_spans_its_phases_and_its_container() -> None:
    found = sent()

    assert {*found} == {"sandbox start", "sockets", "container start", "Create"}
    start, container = found["sandbox start"], found["container start"]
    assert start.parent is None
    assert (start.start_time, start.end_time) == (10**18 + 10**9, 10**18 + 2 * 10**9)
    assert [event.name for event in start.events] == ["ready"]
    assert parent_of(found["sockets"]) == parent_of(container) == context_of(start)[1]
    assert parent_of(found["Create"]) == context_of(container)[1]
    assert dict(found["sockets"].attributes or {}) == {"hako.lane": "shim"}
    assert dict(container.attributes or {}) == {"hako.sandbox.id": "box", "hako.container.id": "box"}
    assert start.resource.attributes["service.name"] == "hako"
    assert {span.status.status_code for span in found.values()} == {StatusCode.UNSET}


def test_spans_are_below_those_that_containerd_names() -> None:
    carried = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    found = sent(carried=carried, sandbox_carried=carried)

    for name in ("sandbox start", "container start"):
        assert parent_of(found[name]) == int(SPAN, 16)
    assert {context_of(span)[0] for span in found.values()} == {int(TRACE, 16)}


def test_a_further_container_has_a_span_of_its_own() -> None:
    found = sent(sandbox_carried=None)

    assert {*found} == {"sockets", "container start", "Create"}
    assert found["container start"].parent is None


def test_a_trace_that_is_not_sampled_is_not_sent() -> None:
    carried = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
    assert sent(carried=carried, sandbox_carried=carried) == {}


def assert_failed(span: ReadableSpan) -> None:
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, FAILURE["text"])
    assert (span.attributes or {})["error.type"] == "InvalidArgument"
    assert span.end_time == 10**18 + 3 * 10**9


def test_a_container_that_does_not_start_ends_its_span_with_the_error() -> None:
    found = sent(failure=FAILURE)

    assert_failed(found["container start"])
    assert {*found} == {"sandbox start", "sockets", "container start", "Create"}
    assert found["sandbox start"].status.status_code is StatusCode.UNSET


def test_a_start_that_is_refused_before_its_first_phase_has_a_span() -> None:
    found = sent(failure=FAILURE, sandbox_carried=None, phases=[])

    assert {*found} == {"container start"}
    assert_failed(found["container start"])
    assert found["container start"].start_time == 10**18 + 1_250_000_000


def test_a_sandbox_that_does_not_start_ends_its_span_with_the_error() -> None:
    found = sent(failure=FAILURE, sandbox_failure=FAILURE)
    for name in ("sandbox start", "container start"):
        assert_failed(found[name])

    found = sent(container="", lane="container ", sandbox_failure=FAILURE, phases=BATCH["phases"][:2])
    assert {*found} == {"sandbox start", "sockets"}
    assert_failed(found["sandbox start"])


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let this process be the one that sends; note in what order it does what."""
    done: list[str] = []
    before = signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(spans, "OTLPSpanExporter", lambda **_: None)
    monkeypatch.setattr(spans, "send", lambda *_: done.append("sent"))
    monkeypatch.setattr(releases, "leave", lambda: done.append("left"))
    monkeypatch.setattr(signal, "alarm", lambda _: None)
    monkeypatch.setattr(os, "_exit", lambda status: done.append(f"exit {status}"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(BATCH)))
    yield done
    signal.signal(signal.SIGALRM, before)


def test_the_last_process_of_an_old_release_takes_it_along(process: list[str]) -> None:
    spans.main()

    assert process == ["sent", "left"]


def test_a_process_that_cannot_send_says_so_and_takes_its_release_along(
    process: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spans, "send", lambda *_: signal.raise_signal(signal.SIGALRM))
    spans.main()

    assert process[:2] == ["left", "exit 1"]
    [line] = capsys.readouterr().err.splitlines()
    assert line == "tracing: not sent within 20 s; look at the endpoint"

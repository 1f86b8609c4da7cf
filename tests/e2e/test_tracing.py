"""Each start, also one that fails, becomes spans that are part of containerd's own trace of the request."""

from __future__ import annotations

import gzip
import json
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from shim import cli
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import HAKO, _stack, new_id, write_config
from tests.e2e.containerd import RELEASES
from tests.e2e.life import until
from tests.e2e.test_sandbox_api import SandboxByHand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    from tests.e2e.conftest import Stack
    from tests.e2e.nursery import Nursery

pytestmark = pytest.mark.hako

PARTS = {"CreateContainer", "StartContainer"}


class Receiver(ThreadingHTTPServer):
    """A collector of OTLP over HTTP on the loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: dict[bytes, tuple[str, Span]] = {}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, name: str, *, service: str) -> list[Span]:
        """The spans of a name that a service has sent."""
        return [span for sender, span in list(self.spans.values()) if (sender, span.name) == (service, name)]

    def below(self, parent: Span) -> list[Span]:
        """The spans that are part of another."""
        return [span for _, span in list(self.spans.values()) if span.parent_span_id == parent.span_id]

    def names_below(self, parent: Span) -> set[str]:
        """The names of these spans."""
        return {span.name for span in self.below(parent)}


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.server.spans |= {span.span_id: (names["service.name"], span) for span in scope.spans}
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced(
    receiver: Receiver, home: Path, nursery: Nursery, image_archive: Path, templates: Path
) -> Iterator[Stack]:
    """A containerd that traces its requests, and whose shims trace their starts."""
    with _stack(
        home,
        nursery,
        image_archive,
        release=RELEASES[-1],
        protocol="ttrpc",
        runtime=HAKO,
        templates=templates,
        name="traced",
        environment={
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        },
        shim=endpoint(receiver),
    ) as stack:
        yield stack


def endpoint(receiver: Receiver) -> str:
    return f'tracing_endpoint = "{receiver.url}/v1/traces"'


def attribute(span: Span, name: str) -> str:
    return {each.key: each.value.string_value for each in span.attributes}.get(name, "")


def span_of(receiver: Receiver, name: str, *, sandbox: str) -> Span:
    """Wait for the only span of a name that a sandbox's shim has sent."""

    def sent() -> list[Span]:
        spans = receiver.named(name, service="hako")
        return [span for span in spans if attribute(span, "hako.sandbox.id") == sandbox]

    found: list[Span] = until(sent, what=f"the span {name}")
    [span] = found
    return span


def request_of(receiver: Receiver, span: Span) -> Span:
    """Wait for the span of containerd's request that a span belongs to."""
    until(lambda: span.parent_span_id in receiver.spans, what="containerd's span")
    sender, request = receiver.spans[span.parent_span_id]
    assert sender == "containerd"
    assert request.trace_id == span.trace_id
    return request


def test_a_start_is_part_of_containerds_trace(traced: Stack, receiver: Receiver) -> None:
    name = new_id()
    ran = traced.containerd.run(IMAGE, name, "sleep", "100000", options=["--detach"])
    try:
        assert ran.code == 0, ran.stderr
        start = span_of(receiver, "sandbox start", sandbox=name)
        container = span_of(receiver, "container start", sandbox=name)
        request = request_of(receiver, start)
        until(lambda: receiver.names_below(container) >= PARTS, what="the parts of the container's start")
    finally:
        traced.containerd.remove(name)

    assert request.name.endswith("Create")
    assert container.trace_id == request.trace_id
    assert container.parent_span_id == start.parent_span_id
    assert request.start_time_unix_nano < start.end_time_unix_nano
    for span in receiver.below(container):
        assert container.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    assert {start.status.code, container.status.code} == {Status.STATUS_CODE_UNSET}
    assert log_of(traced) == ""


def test_a_container_that_does_not_start_ends_its_span_with_the_error(
    traced: Stack, receiver: Receiver
) -> None:
    name = new_id()
    ran = traced.containerd.run(IMAGE, name, "no-such-program", options=["--rm"])
    assert ran.code != 0
    container = span_of(receiver, "container start", sandbox=name)
    start = span_of(receiver, "sandbox start", sandbox=name)

    assert request_of(receiver, container).name.endswith("Create")
    assert container.status.code == Status.STATUS_CODE_ERROR
    assert "no-such-program" in container.status.message
    assert container.status.message in ran.stderr
    assert attribute(container, "error.type")
    assert start.status.code == Status.STATUS_CODE_UNSET
    until(lambda: "CreateContainer" in receiver.names_below(container), what="a part of the failed start")
    assert log_of(traced) == ""


def test_a_sandbox_that_does_not_start_ends_its_span_with_the_error(
    traced: Stack, receiver: Receiver, home: Path
) -> None:
    config = write_config(
        home / "no-kernel.toml",
        state_directory=traced.state_directory,
        shim=endpoint(receiver),
        guest='kernel = "/nowhere/vmlinux"',
    )
    name = new_id()
    ran = traced.containerd.run(IMAGE, name, "true", options=["--rm", "--runtime-config-path", config])
    assert ran.code != 0
    spans = [span_of(receiver, f"{what} start", sandbox=name) for what in ("sandbox", "container")]

    for span in spans:
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert "/nowhere/vmlinux" in span.status.message
        assert request_of(receiver, span).name.endswith("Create")
    assert log_of(traced) == ""


@pytest.mark.parametrize(
    ("phase", "config", "reason"),
    [
        ("create", {"hostname": "x" * 65}, "hostname"),
        ("boot", {"annotations": {"io.hako.vcpus": "0"}}, "annotation io.hako.vcpus: "),
    ],
)
def test_a_pod_that_the_sandbox_service_cannot_start_is_traced_and_counted(
    sent: Sent, tmp_path: Path, phase: str, config: dict[str, Any], reason: str
) -> None:
    trace, parent = "ab" * 16, "cd" * 8
    metadata = (("traceparent", f"00-{trace}-{parent}-01"),)
    before = sent.failures()
    with SandboxByHand(sent.stack, tmp_path, metadata=metadata) as pod:
        with pytest.raises(grpc.RpcError) as refused:
            start(pod, config)
        span = span_of(sent.receiver, "sandbox start", sandbox=pod.id)

    assert reason in span.status.message
    assert span.status.message == refused.value.details()
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, parent)
    assert attribute(span, "error.type") == "InvalidArgument"
    assert sent.failures() - before == Counter({(phase, "InvalidArgument"): 1})
    assert log_of(sent.stack) == ""


def start(pod: SandboxByHand, config: dict[str, Any]) -> None:
    pod.create(**config)
    pod.sandbox("StartSandbox")


@dataclass(frozen=True)
class Sent:
    """What a node tells its operator of failed starts.

    :param stack: its containerd.
    :param receiver: where its traces go.
    :param capsys: reads what a command prints.
    """

    stack: Stack
    receiver: Receiver
    capsys: pytest.CaptureFixture[str]

    def failures(self) -> Counter[tuple[str, str]]:
        """What ``hako metrics`` has counted so far, by phase and cause."""
        self.capsys.readouterr()
        cli.main(["metrics", "--json", "--config", str(self.stack.config)])
        families = {each["name"]: each["samples"] for each in json.loads(self.capsys.readouterr().out)}
        counted = [(each["labels"], each["value"]) for each in families["hako_failures"]]
        return Counter({(labels["phase"], labels["cause"]): int(value) for labels, value in counted})


@pytest.fixture
def sent(traced: Stack, receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> Sent:
    return Sent(traced, receiver, capsys)


def log_of(stack: Stack) -> str:
    return (stack.state_directory.parent / "log/tracing.log").read_text()

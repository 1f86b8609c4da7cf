"""A start becomes spans that are part of containerd's own trace of the request."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import HAKO, _stack, new_id
from tests.e2e.containerd import RELEASES
from tests.e2e.life import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    from tests.e2e.nursery import Nursery

pytestmark = pytest.mark.hako


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


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_start_is_part_of_containerds_trace(
    receiver: Receiver, home: Path, nursery: Nursery, image_archive: Path, templates: Path
) -> None:
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
        shim=f'tracing_endpoint = "{receiver.url}/v1/traces"',
    ) as stack:
        name = new_id()
        ran = stack.containerd.run(IMAGE, name, "sleep", "100000", options=["--detach"])
        try:
            assert ran.code == 0, ran.stderr
            [start] = until(lambda: receiver.named("sandbox start", service="hako"), what="a span")
            [container] = until(lambda: receiver.named("container start", service="hako"), what="a span")
            until(lambda: start.parent_span_id in receiver.spans, what="containerd's span")
        finally:
            stack.containerd.remove(name)

    sender, request = receiver.spans[start.parent_span_id]
    assert sender == "containerd"
    assert request.name.endswith("Create")
    assert start.trace_id == container.trace_id == request.trace_id
    assert container.parent_span_id == start.parent_span_id
    assert request.start_time_unix_nano < start.end_time_unix_nano
    children = [span for _, span in receiver.spans.values() if span.parent_span_id == container.span_id]
    assert {span.name for span in children} >= {"CreateContainer", "StartContainer"}
    for span in children:
        assert container.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    attributes = {each.key: each.value.string_value for each in start.attributes}
    assert attributes["hako.sandbox.id"] == name
    assert (stack.state_directory.parent / "log/tracing.log").read_text() == ""

"""The process that sends the phases of a start, which it reads from standard input, as OpenTelemetry spans.

Only this process imports OpenTelemetry. Its library reads more settings from the environment, such as
``OTEL_EXPORTER_OTLP_HEADERS``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shim.host import releases
from shim.version import version

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_DEADLINE_S = 20
_EXPORT_TIMEOUT_S = 5.0
_NS_PER_S = 10**9


def main() -> None:
    """Send what the standard input describes; the end of the process is the only answer."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_DEADLINE_S)
    try:
        batch = json.load(sys.stdin)
        send(batch, OTLPSpanExporter(endpoint=batch["endpoint"], timeout=_EXPORT_TIMEOUT_S))
    finally:
        releases.leave()  # the sandbox may have been the last one of an old release


def _give_up(*_: object) -> None:
    print(f"tracing: not sent within {_DEADLINE_S} s; look at the endpoint", file=sys.stderr, flush=True)
    releases.leave()
    os._exit(1)


def send(batch: dict[str, Any], exporter: SpanExporter) -> None:
    """Send a batch.

    A sandbox's first batch has a span for its start, with a span for each phase; a moment becomes an event.
    The container's start has one with its own phases. The span of a start that failed ends with the error.

    :param batch: what :class:`shim.telemetry.trace_export.TraceExport` wrote.
    :param exporter: where to.
    """
    resource = Resource.create({"service.name": "hako", "service.version": version()})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    sender = _Sender(provider.get_tracer("hako", version()), batch)
    sandbox_phases = [phase for phase in batch["phases"] if phase[0] != batch["lane"]]
    own_phases = [phase for phase in batch["phases"] if phase[0] == batch["lane"]]
    failure, sandbox_failure = batch["failure"], batch["sandbox_failure"]
    around = None
    if batch["sandbox_carried"] is not None:
        around = sender.tree(
            "sandbox start",
            sandbox_phases,
            parent=_remote(batch["sandbox_carried"]),
            whole=[*batch["phases"], *_requests(failure, sandbox_failure)],
            failure=sandbox_failure,
        )
        sandbox_phases = []
    parent = _remote(batch["carried"]) or (trace.set_span_in_context(around) if around else None)
    if own_phases or failure:
        sender.tree(
            "container start",
            [*own_phases, *sandbox_phases],
            parent=parent,
            whole=[*own_phases, *_requests(failure)],
            failure=failure,
            more={"hako.container.id": batch["container"]},
        )
    provider.shutdown()


def _remote(carried: dict[str, str]) -> Context | None:
    return TraceContextTextMapPropagator().extract(carried) if carried else None


def _requests(*failures: dict[str, Any] | None) -> list[Any]:
    """List the requests that failed as phases: one that fails early has none."""
    return [("", "", each["began_s"], each["ended_s"]) for each in failures if each]


class _Sender:
    def __init__(self, tracer: trace.Tracer, batch: dict[str, Any]) -> None:
        self._tracer = tracer
        self._attributes = batch["attributes"]
        self._epoch_ns = int(batch["epoch_ns"])

    def tree(
        self,
        name: str,
        phases: list[Any],
        *,
        parent: Context | None,
        whole: list[Any],
        failure: dict[str, Any] | None,
        more: dict[str, str] | None = None,
    ) -> Span:
        """Send a span with a child for each phase.

        :param name: of the span.
        :param phases: its children.
        :param parent: its own parent.
        :param whole: phases that it spans.
        :param failure: why what it spans failed.
        :param more: further attributes.
        """
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=SpanKind.SERVER,
            attributes={**self._attributes, **(more or {})},
            start_time=self._at(min(began_s for _, _, began_s, _ in whole)),
        )
        inside = trace.set_span_in_context(span)
        for lane, text, began_s, ended_s in phases:
            attributes = {"hako.lane": lane}
            if began_s == ended_s:
                span.add_event(text, attributes, timestamp=self._at(began_s))
                continue
            child = self._tracer.start_span(
                text, context=inside, attributes=attributes, start_time=self._at(began_s)
            )
            child.end(self._at(ended_s))
        if failure:
            span.set_attribute("error.type", failure["type"])
            span.set_status(Status(StatusCode.ERROR, failure["text"]))
        span.end(self._at(max(ended_s for *_, ended_s in whole)))
        return span

    def _at(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * _NS_PER_S)


if __name__ == "__main__":
    main()

"""Providers of OpenTelemetry that keep what they are told, for tests to look at."""

from __future__ import annotations

from collections import Counter
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_tasks.observers.opentelemetry import OpenTelemetryObserver


class Telemetry:
    """Providers that keep what they are told, and an observer that tells them."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self.tracer_provider.get_tracer("tests")
        self.observer = OpenTelemetryObserver(
            tracer_provider=self.tracer_provider, meter_provider=self.meter_provider
        )

    @property
    def all_spans(self) -> tuple[ReadableSpan, ...]:
        """The spans that are over, in the order in which they ended."""
        return self._exporter.get_finished_spans()

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """The spans that are over, by their names, the latest of each."""
        return {span.name: span for span in self.all_spans}

    @property
    def names(self) -> list[str]:
        """The names of the spans that are over, in this order."""
        return [span.name for span in self.all_spans]

    def attributes(self, key: str) -> list[object]:
        """Return one attribute of all spans that are over, without the prefix of ours."""
        key = key if "." in key else f"fastapi_tasks.task.{key}"
        return [(span.attributes or {}).get(key) for span in self.all_spans]

    def told(self) -> list[str]:
        """Return everything that was told, in words."""
        spans = [span.to_json() for span in self.all_spans]
        data = self._reader.get_metrics_data()
        return [*spans, "" if data is None else data.to_json()]

    def points(self, name: str) -> list[Any]:
        """Return the data points of one metric of ours."""
        data = self._reader.get_metrics_data()
        return [
            point
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == f"fastapi_tasks.task.{name}"
            for point in metric.data.data_points
        ]

    def total(self, name: str) -> int:
        """Return the sum of one metric of ours."""
        return sum(point.value for point in self.points(name))

    def counts(self, name: str = "finished") -> Counter[str]:
        """Return a metric of ours by outcome."""
        counts: Counter[str] = Counter()
        for point in self.points(name):
            counts[point.attributes["fastapi_tasks.task.outcome"]] += getattr(
                point, "value", getattr(point, "count", 0)
            )
        return counts

    def assert_settled(self) -> None:
        """Nothing is pending or live, whatever one groups it by."""
        for name in ("pending", "live"):
            assert {point.value for point in self.points(name)} <= {0}, name


class TracedRequests:
    """A middleware that makes a span of each request, which ends with the response."""

    def __init__(self, app: ASGIApp, tracer: trace.Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        span = self._tracer.start_span("request")

        async def send_and_end(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                span.end()

        with trace.use_span(span):
            await self._app(scope, receive, send_and_end)

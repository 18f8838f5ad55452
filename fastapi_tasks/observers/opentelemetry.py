"""OpenTelemetry: a span for each run of a task, and metrics of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from time import perf_counter
from typing import Any, TypeAlias, cast

from fastapi_tasks.callables import parts, qualified_name
from fastapi_tasks.errors import InvalidSettingError
from fastapi_tasks.extras import extra
from fastapi_tasks.observer import TaskEvent, TaskEventKind
from fastapi_tasks.tasks import Task, find_current_task, is_over

with extra("opentelemetry", __name__, opentelemetry="opentelemetry-api"):
    from opentelemetry import context as contexts
    from opentelemetry import metrics, trace

__all__ = ["OpenTelemetryObserver"]

_Attributes: TypeAlias = dict[str, str | int]

# https://opentelemetry.io/docs/specs/semconv/registry/attributes/code/
# https://opentelemetry.io/docs/specs/semconv/registry/attributes/error/
_FUNCTION = "code.function.name"
_ERROR = "error.type"
# There are no conventions for what runs within a process.
_ID = "fastapi_tasks.task.id"
_ATTEMPT = "fastapi_tasks.task.attempt"
_MOMENT = "fastapi_tasks.task.moment"
_OUTCOME = "fastapi_tasks.task.outcome"

# The default ones are made for milliseconds, and a task may take longer than a request.
_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class OpenTelemetryObserver:
    """Makes a span of each run of a task, and keeps the metrics.

    ``add_tasks(app, observers=[OpenTelemetryObserver()])``

    :param telemetry: the dictionary that the app was made with, as in
        ``FastAPI(telemetry=telemetry)``. Its ``tracer_provider`` and ``meter_provider`` are used,
        and there are no spans if its ``tracing`` is false, and no metrics if its ``metrics`` is
    :param tracer_provider: where the spans go; by default to that of ``telemetry``, else to the
        global one
    :param meter_provider: where the metrics go; by default to that of ``telemetry``, else to the
        global one
    :raises InvalidSettingError: one of them is something else
    """

    def __init__(
        self,
        *,
        telemetry: Mapping[str, object] | None = None,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        settings = _checked_settings(telemetry)
        if settings.get("tracing", True):
            tracer_provider = tracer_provider or settings.get("tracer_provider")
        else:
            tracer_provider = trace.NoOpTracerProvider()
        if settings.get("metrics", True):
            meter_provider = meter_provider or settings.get("meter_provider")
        else:
            meter_provider = metrics.NoOpMeterProvider()
        _check_provider("tracer_provider", tracer_provider, "get_tracer")
        _check_provider("meter_provider", meter_provider, "get_meter")
        number = version("fastapi-tasks")
        self._tracer = trace.get_tracer("fastapi_tasks", number, tracer_provider)
        meter = metrics.get_meter("fastapi_tasks", number, meter_provider)
        self._started = meter.create_counter(
            "fastapi_tasks.task.started", "{task}", "Tasks whose function has begun to run."
        )
        self._finished = meter.create_counter(
            "fastapi_tasks.task.finished", "{task}", "Tasks that are over, by their outcome."
        )
        self._duration = meter.create_histogram(
            "fastapi_tasks.task.duration",
            "s",
            "Duration of the single runs of tasks.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._live = meter.create_up_down_counter(
            "fastapi_tasks.task.live", "{task}", "Tasks that have begun and are not over."
        )
        self._pending = meter.create_up_down_counter(
            "fastapi_tasks.task.pending", "{task}", "Tasks that were scheduled and have not begun."
        )
        # By their ids: a task whose loop was closed is over when it is collected, and not before.
        self._begun: dict[str, _Begun] = {}

    def __call__(self, event: TaskEvent, /) -> None:
        """Take note of an event."""
        match event.kind:
            case TaskEventKind.SCHEDULED:
                self._pending.add(1, _attributes_of(event.task))
            case TaskEventKind.STARTED:
                self._begin(event.task)
            case TaskEventKind.RETRYING:
                self._end_attempt(event.task, event.error)
            case TaskEventKind.FINISHED:
                self._finish(event.task, "succeeded")
            case TaskEventKind.FAILED:
                self._finish(event.task, "failed", event.error)
            case TaskEventKind.CANCELLED:
                self._finish(event.task, "cancelled")
            case TaskEventKind.DROPPED:
                self._finish(event.task, "dropped")
            case TaskEventKind.DRAIN_ABANDONING:
                for task in event.tasks:
                    self._abandon(task)
            case _:  # an error handler's failure, the other steps of a drain
                pass

    def _begin(self, task: Task) -> None:
        attributes = _attributes_of(task)
        if task.id not in self._begun:
            self._pending.add(-1, attributes)
            self._live.add(1, attributes)
            self._started.add(1, attributes)
            self._begun[task.id] = _Begun()  # first of all: a processor of spans may raise
        else:
            # Nobody tells of the wait if stamina's hooks are set anew just before it.
            self._end_run(task, self._begun[task.id], "retried")
        attributes = attributes | {_ID: task.id, _ATTEMPT: task.attempt}
        run = _Run(self._tracer.start_span(task.name, attributes=attributes))
        self._begun[task.id].run = run
        run.enter()

    def _end_attempt(self, task: Task, error: BaseException | None) -> None:
        if is_over(task):  # a job, the next attempt of which may be made by another process
            self._finish(task, "retried", error)
        else:
            self._end_run(task, self._begun[task.id], "retried", error)

    def _finish(self, task: Task, outcome: str, error: BaseException | None = None) -> None:
        if task.id not in self._begun:
            self._count_end(self._pending, task, outcome, error)
            return
        begun = self._begun.pop(task.id)
        if not begun.is_abandoned:  # else it was counted then
            self._count_end(self._live, task, outcome, error)
        self._end_run(task, begun, outcome, error)

    def _abandon(self, task: Task) -> None:
        begun = self._begun.get(task.id)
        if begun is None:
            return  # it is over, and its error handler or one of its threads goes on
        begun.is_abandoned = True
        self._count_end(self._live, task, "abandoned")
        self._end_run(task, begun, "abandoned")

    def _count_end(
        self,
        left: metrics.UpDownCounter,
        task: Task,
        outcome: str,
        error: BaseException | None = None,
    ) -> None:
        attributes = _attributes_of(task)
        left.add(-1, attributes)
        self._finished.add(1, attributes | _result(outcome, error))

    def _end_run(
        self, task: Task, begun: _Begun, outcome: str, error: BaseException | None = None
    ) -> None:
        run = begun.run
        if run is None:
            return  # there was no span to be had
        is_own_context = find_current_task() is task
        try:
            if not run.is_over:
                run.is_over = True
                result = _result(outcome, error)
                # While the span is the current one, so that the two can be brought together.
                self._duration.record(run.seconds(), _attributes_of(task) | result)
                run.end(result, error)
        finally:
            if is_own_context:
                run.leave()


class _Begun:
    """What is known of a task that has begun, until it is over."""

    __slots__ = ("is_abandoned", "run")

    def __init__(self) -> None:
        self.is_abandoned = False
        self.run: _Run | None = None


class _Run:
    """One run of a task's function.

    :param span: its span
    """

    __slots__ = ("_begin", "_former", "_span", "is_over")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        # Not the token that a context is left by, which leads to the task, by its variables.
        self._former = contexts.get_current()
        self._begin = perf_counter()
        self.is_over = False

    def enter(self) -> None:
        """Let the function's own spans be children of this one."""
        contexts.attach(trace.set_span_in_context(self._span))

    def leave(self) -> None:
        """Take that back, in the same context."""
        contexts.attach(self._former)

    def seconds(self) -> float:
        """Return how long it has taken so far."""
        return perf_counter() - self._begin

    def end(self, result: _Attributes, error: BaseException | None) -> None:
        """End the span."""
        try:
            self._span.set_attributes(result)
            if error is not None:
                self._span.set_status(trace.StatusCode.ERROR)
                self._span.record_exception(error)  # last: it asks the error for its text
        finally:
            self._span.end()


def _attributes_of(task: Task) -> _Attributes:
    """Return what is the same in all that is told of a task, and of few kinds altogether.

    A task's name may be made for a single one, so no metric has it.
    """
    return {_FUNCTION: _name_of(task.func), _MOMENT: task.moment}


def _name_of(func: Callable[..., object]) -> str:
    module = getattr(parts(func)[0], "__module__", None)
    name = qualified_name(func)
    return f"{module}.{name}" if isinstance(module, str) else name


def _result(outcome: str, error: BaseException | None = None) -> _Attributes:
    if error is None:
        return {_OUTCOME: outcome}
    kind = type(error)
    name = kind.__qualname__
    return {
        _OUTCOME: outcome,
        _ERROR: name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}",
    }


def _checked_settings(telemetry: object) -> Mapping[str, Any]:
    if telemetry is None:
        return {}
    if not isinstance(telemetry, Mapping):
        raise InvalidSettingError(
            "telemetry",
            telemetry,
            expected="the dictionary that FastAPI(telemetry=...) was given",
            instead="OpenTelemetryObserver(telemetry=telemetry), after "
            "app = FastAPI(telemetry=telemetry)",
        )
    return cast("Mapping[str, Any]", telemetry)


def _check_provider(setting: str, provider: object, method: str) -> None:
    # By what it can do: some vendors wrap providers, and share no class with them.
    if provider is not None and not callable(getattr(provider, method, None)):
        raise InvalidSettingError(
            setting,
            provider,
            expected=f"an object with {method}(), as the SDK's providers are",
            instead="OpenTelemetryObserver(tracer_provider=TracerProvider())",
        )

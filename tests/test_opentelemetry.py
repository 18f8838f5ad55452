"""What the OpenTelemetry observer makes of tasks: spans in their request's trace, and metrics."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.to_thread
import pytest
import stamina
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from fastapi_tasks import (
    InvalidSettingError,
    MissingPackageError,
    Retry,
    Supervisor,
    Task,
    Tasks,
    TasksScheduler,
    add_tasks,
)
from fastapi_tasks.observers.opentelemetry import OpenTelemetryObserver

from .asgi import lifespan, request
from .clocks import on_fake_clocks  # noqa: F401 - a fixture
from .conftest import on_real_clocks
from .recording import collect_within_a_task, idle, let_others_run
from .servers import PATIENCE
from .telemetry import Telemetry, TracedRequests


class OffTheRailsError(Exception):
    """What goes wrong in this module."""


@pytest.fixture
def telemetry() -> Telemetry:
    """A place of this test's own for spans and metrics."""
    return Telemetry()


@pytest.fixture
def traced(telemetry: Telemetry) -> FastAPI:
    """An app with spans of its requests and tasks."""
    app = FastAPI()
    add_tasks(app, observers=[telemetry.observer])
    app.add_middleware(TracedRequests, tracer=telemetry.tracer)
    return app


@pytest.fixture(autouse=True)
def no_error_of_the_observer(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What the observer raises goes no further, so it has to be looked for."""
    yield
    records = caplog.get_records("call")
    assert [r.getMessage() for r in records if r.getMessage().startswith("The observer")] == []


async def couple() -> None:
    """Succeed."""


def couple_in_thread() -> None:
    """Succeed in a thread."""


async def derail() -> None:
    """Fail."""
    raise OffTheRailsError("at the points")


def derail_in_thread() -> None:
    """Fail in a thread."""
    raise OffTheRailsError("at the points")


async def stand() -> None:
    """Run until somebody cancels it."""
    await anyio.sleep(math.inf)


async def cling() -> None:
    """Clean up for longer than anybody waits."""
    try:
        await stand()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(60)


def parent_of(span: ReadableSpan) -> int | None:
    """Return the id of a span's parent."""
    return None if span.parent is None else span.parent.span_id


# The trace of a request


async def test_every_task_of_a_request_is_in_its_trace(
    traced: FastAPI, telemetry: Telemetry
) -> None:
    """One span for each, a child of the request's, that tells its moment."""

    @traced.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.task(name="first").schedule(couple)
        tasks.after_route.task(name="second").schedule(couple)
        tasks.after_response.task(name="third").schedule(couple)

    async with lifespan(traced):
        await request(traced, "/")
        await let_others_run()

    spans = telemetry.spans
    assert set(spans) == {"first", "second", "third", "request"}
    served = spans["request"]
    for name, moment in [("first", "now"), ("second", "after_route"), ("third", "after_response")]:
        span = spans[name]
        assert span.context.trace_id == served.context.trace_id
        assert parent_of(span) == served.context.span_id
        assert span.attributes is not None
        assert span.attributes["fastapi_tasks.task.moment"] == moment


async def test_a_span_says_what_has_run(telemetry: Telemetry) -> None:
    """Named after the task, with the conventions' names where there are some."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        task = supervisor.task(name="coupling").schedule(couple)
        await idle(supervisor)

    span = telemetry.spans["coupling"]
    assert span.kind is trace.SpanKind.INTERNAL
    assert span.status.status_code is trace.StatusCode.UNSET
    assert span.attributes == {
        "code.function.name": f"{__name__}.couple",
        "fastapi_tasks.task.id": task.id,
        "fastapi_tasks.task.attempt": 1,
        "fastapi_tasks.task.moment": "now",
        "fastapi_tasks.task.outcome": "succeeded",
    }
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "fastapi_tasks"


async def test_a_task_that_no_request_has_scheduled_begins_a_trace(telemetry: Telemetry) -> None:
    """Its span has no parent; and one that it schedules belongs to it."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:

        async def outer() -> None:
            supervisor.schedule(couple)

        supervisor.task(name="outer").schedule(outer)
        await anyio.sleep(1)

    spans = telemetry.spans
    assert parent_of(spans["outer"]) is None
    assert parent_of(spans["couple"]) == spans["outer"].context.span_id


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functools.partial(couple), f"{__name__}.couple"),
        (Telemetry, "tests.telemetry.Telemetry"),
        (math.floor, "math.floor"),
        ([].clear, "list.clear"),
    ],
)
@on_real_clocks
async def test_a_function_is_named_with_its_module(
    function: Callable[..., Any], name: str, telemetry: Telemetry
) -> None:
    """Whatever kind of callable it is, and with no argument's value."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        supervisor.schedule(function, *([1.5] if function is math.floor else []))
        await idle(supervisor)

    assert telemetry.attributes("code.function.name") == [name]


# The request's latency


async def test_a_request_does_not_wait_in_its_trace_for_its_tasks(
    traced: FastAPI, telemetry: Telemetry
) -> None:
    """Its span is over with the response, while they run."""
    freed = anyio.Event()

    @traced.get("/")
    async def endpoint(tasks: Tasks) -> None:
        for moment in (tasks, tasks.after_route, tasks.after_response):
            moment.schedule(freed.wait)

    async with lifespan(traced):
        await request(traced, "/")
        await let_others_run()

        assert telemetry.names == ["request"]
        assert (telemetry.total("live"), telemetry.total("pending")) == (3, 0)
        freed.set()
        await let_others_run()

    assert telemetry.names == ["request", *["Event.wait"] * 3]
    served, *tasks = telemetry.all_spans
    assert served.end_time is not None
    assert all(task.end_time is not None and task.end_time > served.end_time for task in tasks)


@pytest.mark.skipif(
    "telemetry" not in inspect.signature(FastAPI).parameters, reason="this FastAPI has none"
)
async def test_the_telemetry_of_fastapi_and_of_tasks_go_together(telemetry: Telemetry) -> None:
    """With the app's own providers: one trace, and a latency that no task adds to."""
    settings: Any = {
        "tracer_provider": telemetry.tracer_provider,
        "meter_provider": telemetry.meter_provider,
    }
    app = FastAPI(telemetry=settings)
    add_tasks(app, observers=[OpenTelemetryObserver(telemetry=settings)])
    freed = anyio.Event()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(freed.wait)
        tasks.after_route.schedule(freed.wait)
        tasks.after_response.schedule(freed.wait)

    async with lifespan(app):
        await request(app, "/")
        await let_others_run()

        served = telemetry.spans["GET /"]
        assert "Event.wait" not in telemetry.names
        assert telemetry.total("live") == 3
        freed.set()
        await let_others_run()

    tasks = [s for s in telemetry.all_spans if s.name == "Event.wait"]
    assert len(tasks) == 3
    for span in tasks:
        assert span.context.trace_id == served.context.trace_id
        assert parent_of(span) is not None
    telemetry.assert_settled()


# While a function runs


@pytest.mark.parametrize("is_threaded", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"timeout": 60}, {"limiter": 1}, {"retry": Retry(OSError)}]
)
@on_real_clocks
async def test_spans_of_the_function_are_children_of_its_own(
    is_threaded: bool, options: dict[str, Any], telemetry: Telemetry
) -> None:
    """In the loop and in a thread, in each of the ways in which it may be run."""
    if "limiter" in options:
        options = {"limiter": anyio.CapacityLimiter(1)}

    def work() -> None:
        with telemetry.tracer.start_as_current_span("inner"):
            pass

    async def work_in_loop() -> None:
        await let_others_run()
        work()

    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        place = supervisor.task(name="outer", **options)
        place.schedule(work if is_threaded else work_in_loop)
        await idle(supervisor)

    spans = telemetry.spans
    assert parent_of(spans["inner"]) == spans["outer"].context.span_id


@pytest.mark.parametrize("function", [derail, derail_in_thread])
@on_real_clocks
async def test_the_former_context_is_back_when_a_run_is_over(
    function: Callable[[], Any], telemetry: Telemetry
) -> None:
    """For the next attempt and for the error handler: they are no part of it."""
    seen: list[trace.Span] = []

    def is_worth_it(error: Exception) -> bool:
        seen.append(trace.get_current_span())
        return len(seen) == 1

    async def report(task: Task, error: Exception) -> None:
        seen.append(trace.get_current_span())

    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        with telemetry.tracer.start_as_current_span("request") as span:
            retry = Retry(is_worth_it, wait_initial=0, wait_jitter=0)
            supervisor.task(retry=retry, on_error=report).schedule(function)
        await idle(supervisor)

    assert seen[-1] is span
    parents = [parent_of(s) for s in telemetry.all_spans if s.name != "request"]
    assert parents == [span.get_span_context().span_id] * 2  # the second is no child of the first


# How runs end


@pytest.mark.parametrize("function", [derail, derail_in_thread])
@on_real_clocks
async def test_a_failure_is_recorded(function: Callable[[], Any], telemetry: Telemetry) -> None:
    """The status, the type, and the exception as an event."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        supervisor.schedule(function)
        await idle(supervisor)

    (span,) = telemetry.spans.values()
    kind = f"{__name__}.OffTheRailsError"
    assert span.status.status_code is trace.StatusCode.ERROR
    assert telemetry.attributes("outcome") == ["failed"]
    assert telemetry.attributes("error.type") == [kind]
    (event,) = span.events
    assert event.attributes is not None
    assert (event.name, event.attributes["exception.type"]) == ("exception", kind)
    assert event.attributes["exception.message"] == "at the points"
    (point,) = telemetry.points("finished")
    assert point.attributes == {
        "code.function.name": f"{__name__}.{function.__name__}",
        "fastapi_tasks.task.moment": "now",
        "fastapi_tasks.task.outcome": "failed",
        "error.type": kind,
    }


async def test_an_error_that_has_no_text_ends_the_span_all_the_same(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    """What it raises when it is asked for one is logged, as any observer's error."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise OffTheRailsError

    async def fail() -> None:
        raise MuteError

    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        supervisor.task(name="mute").schedule(fail)
        await idle(supervisor)

    assert telemetry.spans["mute"].status.status_code is trace.StatusCode.ERROR
    assert telemetry.counts() == {"failed": 1}
    telemetry.assert_settled()
    assert "OffTheRailsError" in caplog.text
    caplog.clear()


async def test_a_task_is_counted_though_there_is_no_span_to_be_had(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    """A processor of spans that raises is nothing to the tasks, nor to their metrics."""

    class Broken(SpanProcessor):
        def on_start(self, span: object, parent_context: object = None) -> None:
            raise OffTheRailsError

    telemetry.tracer_provider.add_span_processor(Broken())
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        task = supervisor.schedule(couple)
        await task.wait()

    assert task.status == "succeeded"
    assert telemetry.counts() == {"succeeded": 1}
    telemetry.assert_settled()
    assert "OffTheRailsError" in caplog.text
    caplog.clear()


async def test_a_builtin_error_has_a_short_type(telemetry: Telemetry) -> None:
    """As the SDK has it in the exception's event."""

    async def fail() -> None:
        raise KeyError

    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        supervisor.schedule(fail)
        await idle(supervisor)

    assert telemetry.attributes("error.type") == ["KeyError"]


async def test_every_attempt_has_a_span(telemetry: Telemetry) -> None:
    """Those of one task are told apart by their numbers; one task has started and finished."""
    runs: list[int] = []

    async def fail_twice() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise OffTheRailsError
        assert telemetry.total("live") == 1

    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        task = supervisor.task(retry=Retry(OffTheRailsError)).schedule(fail_twice)
        await task.wait()

    assert telemetry.attributes("attempt") == [1, 2, 3]
    assert telemetry.attributes("outcome") == ["retried", "retried", "succeeded"]
    assert set(telemetry.attributes("id")) == {task.id}
    error = f"{__name__}.OffTheRailsError"
    assert telemetry.attributes("error.type") == [error, error, None]
    assert telemetry.total("started") == 1
    assert telemetry.counts() == {"succeeded": 1}
    assert telemetry.counts("duration") == {"retried": 2, "succeeded": 1}
    for point in telemetry.points("duration"):
        assert 0 < point.sum < PATIENCE
        assert (point.explicit_bounds[0], point.explicit_bounds[-1]) == (0.005, 3600)  # seconds
    telemetry.assert_settled()


async def test_a_run_has_ended_before_the_next_one_though_nobody_told_of_the_wait(
    telemetry: Telemetry,
) -> None:
    """As whoever sets stamina's hooks anew may bring about: no span is lost, and none is nested."""

    def is_worth_it(error: Exception) -> bool:
        stamina.instrumentation.set_on_retry_hooks([])
        return True

    async def derail() -> None:
        raise OffTheRailsError

    retry = Retry(is_worth_it, attempts=3, wait_initial=0, wait_jitter=0)
    try:
        async with Supervisor(observers=[telemetry.observer]) as supervisor:
            with telemetry.tracer.start_as_current_span("request") as around:
                supervisor.task(retry=retry).schedule(derail)
            await idle(supervisor)
    finally:
        stamina.instrumentation.set_on_retry_hooks(None)

    runs = [span for span in telemetry.all_spans if span.name != "request"]
    assert [(run.attributes or {})["fastapi_tasks.task.attempt"] for run in runs] == [1, 2, 3]
    assert {run.parent and run.parent.span_id for run in runs} == {
        around.get_span_context().span_id
    }
    assert telemetry.counts("duration") == {"retried": 2, "failed": 1}
    telemetry.assert_settled()


async def test_a_run_that_takes_too_long_has_failed(telemetry: Telemetry) -> None:
    """Its span ends with its time."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        with suppress(TimeoutError):
            await supervisor.task(timeout=3).schedule(stand).wait()

    assert telemetry.attributes("outcome") == ["failed"]
    assert telemetry.attributes("error.type") == ["fastapi_tasks.TaskTimeoutError"]
    telemetry.assert_settled()


async def test_a_cancelled_run_is_no_error(telemetry: Telemetry) -> None:
    """It ends with its outcome, as it was asked to."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        task = supervisor.schedule(stand)
        await task.started.wait()
        task.cancel()
        await idle(supervisor)

    (span,) = telemetry.spans.values()
    assert telemetry.attributes("outcome") == ["cancelled"]
    assert (span.status.status_code, span.events) == (trace.StatusCode.UNSET, ())
    assert telemetry.counts() == {"cancelled": 1}
    telemetry.assert_settled()


async def test_a_task_that_is_cancelled_between_two_attempts_has_no_span_for_that(
    telemetry: Telemetry,
) -> None:
    """It has its outcome as a metric, and the first attempt's span."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        retry = Retry(OffTheRailsError, wait_initial=60, wait_max=60)
        task = supervisor.task(retry=retry).schedule(derail)
        await anyio.sleep(1)
        assert telemetry.attributes("outcome") == ["retried"]
        task.cancel()
        await idle(supervisor)

    assert telemetry.attributes("outcome") == ["retried"]
    assert telemetry.counts() == {"cancelled": 1}
    telemetry.assert_settled()


async def test_what_never_begins_is_counted_and_has_no_span(telemetry: Telemetry) -> None:
    """Cancelled or dropped: there was nothing that took time."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        supervisor.schedule(couple).cancel()
        batch = TasksScheduler(supervisor).after_response
        batch.schedule(couple)
        assert telemetry.total("pending") == 1
        batch.release(failed=True)
        await idle(supervisor)

    assert telemetry.names == []
    assert telemetry.counts() == {"cancelled": 1, "dropped": 1}
    assert telemetry.total("started") == 0
    telemetry.assert_settled()


# Shutdown


async def test_an_abandoned_task_ends_its_span(telemetry: Telemetry) -> None:
    """When it is abandoned, since nobody may be there to see its end."""
    supervisor = Supervisor(observers=[telemetry.observer])
    await supervisor.start()
    task = supervisor.schedule(cling)
    await task.started.wait()

    report = await supervisor.drain()

    assert report.abandoned == (task,)
    assert telemetry.attributes("outcome") == ["abandoned"]
    assert telemetry.counts() == {"abandoned": 1}
    telemetry.assert_settled()
    await task.wait()
    assert telemetry.attributes("outcome") == ["abandoned"]  # and nothing is told of it twice
    assert telemetry.counts() == telemetry.counts("duration") == {"abandoned": 1}
    telemetry.assert_settled()


async def test_the_former_context_is_back_for_an_abandoned_task_too(telemetry: Telemetry) -> None:
    """Its error handler has nothing to do with the span."""
    seen: list[trace.Span] = []

    async def withstand() -> None:
        with suppress(anyio.get_cancelled_exc_class()):
            await cling()
        raise OffTheRailsError

    async def report(task: Task, error: Exception) -> None:
        seen.append(trace.get_current_span())

    supervisor = Supervisor(observers=[telemetry.observer])
    await supervisor.start()
    with telemetry.tracer.start_as_current_span("request") as span:
        task = supervisor.task(on_error=report).schedule(withstand)
    await task.started.wait()

    await supervisor.drain()
    with suppress(OffTheRailsError):
        await task.wait()
    await let_others_run()

    assert seen == [span]


async def test_a_task_that_is_abandoned_between_two_attempts_is_counted_once(
    telemetry: Telemetry,
) -> None:
    """As when the server loses its patience with the drain: there is no span to end."""
    supervisor = Supervisor(observers=[telemetry.observer])
    await supervisor.start()
    retry = Retry(OffTheRailsError, wait_initial=60, wait_max=60)
    task = supervisor.task(retry=retry, shield=True).schedule(derail)
    await anyio.sleep(1)

    with anyio.move_on_after(1):
        await supervisor.drain()

    assert task.abandoned
    assert telemetry.counts() == {"abandoned": 1}
    telemetry.assert_settled()
    await task.wait()
    await let_others_run()
    assert telemetry.attributes("outcome") == ["retried"]
    assert telemetry.counts() == {"abandoned": 1}
    telemetry.assert_settled()


async def test_a_task_whose_handler_is_abandoned_has_failed(telemetry: Telemetry) -> None:
    """It was over before."""

    async def handle(task: Task, error: Exception) -> None:
        await cling()

    supervisor = Supervisor(observers=[telemetry.observer])
    await supervisor.start()
    supervisor.task(on_error=handle).schedule(derail)
    await anyio.sleep(1)

    report = await supervisor.drain()

    assert len(report.abandoned) == 1
    assert telemetry.attributes("outcome") == ["failed"]
    assert telemetry.counts() == {"failed": 1}
    telemetry.assert_settled()


def test_what_is_lost_with_its_loop_is_settled(telemetry: Telemetry) -> None:
    """When the supervisor is started again, on another one."""
    supervisor = Supervisor(observers=[telemetry.observer])
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        await supervisor.start()
        await supervisor.schedule(stand).started.wait()

    loop.run_until_complete(begin())
    loop.close()

    async def begin_again() -> None:
        async with supervisor:
            telemetry.assert_settled()

    asyncio.run(begin_again())
    assert telemetry.attributes("outcome") == ["dropped"]
    assert telemetry.counts() == {"dropped": 1}


async def test_whatever_happens_the_counters_come_back_to_zero(telemetry: Telemetry) -> None:
    """After every fate that a task may have, at once."""
    async with Supervisor(observers=[telemetry.observer], shutdown_timeout=20) as supervisor:
        retry = Retry(OffTheRailsError, attempts=2)
        place = supervisor.task(limiter=anyio.CapacityLimiter(1))
        batch = TasksScheduler(supervisor).after_route
        for _ in range(3):
            supervisor.schedule(couple)
            supervisor.schedule(derail)
            supervisor.task(retry=retry).schedule(derail)
            supervisor.task(timeout=1).schedule(stand)
            supervisor.task(delay=100).schedule(couple)
            supervisor.task(shield=True).schedule(cling)
            supervisor.schedule(cling)
            place.schedule(stand)
            batch.schedule(couple)
            supervisor.schedule(couple).cancel()
        await anyio.sleep(8)
        batch.release(failed=True)
        assert (telemetry.total("live"), telemetry.total("pending")) == (7, 5)

    telemetry.assert_settled()
    assert telemetry.counts() == {
        "succeeded": 3,
        "failed": 9,
        "cancelled": 9,
        "abandoned": 6,
        "dropped": 3,
    }
    assert telemetry.total("started") == 3 * 6 + 1
    await anyio.sleep(60)  # until those that were abandoned have ended
    telemetry.assert_settled()


async def test_nothing_is_kept_of_a_task(telemetry: Telemetry) -> None:
    """Neither of one that is over, nor of one that nobody will ever hear of again."""
    async with Supervisor(observers=[telemetry.observer]) as supervisor:
        refs = [
            weakref.ref(supervisor.task(retry=Retry(OffTheRailsError)).schedule(function))
            for function in (couple, derail)
        ]
        await anyio.sleep(60)
        await idle(supervisor)
        await let_others_run()
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
    assert len(telemetry.observer._begun) == 0


def test_nothing_is_kept_of_a_task_whose_loop_and_supervisor_are_gone(
    telemetry: Telemetry,
) -> None:
    """The observer may live for longer than both."""
    lost = Supervisor(observers=[telemetry.observer])
    loop = asyncio.new_event_loop()
    loop.run_until_complete(lost.start())
    task = lost.schedule(stand)
    ref = weakref.ref(task)
    loop.run_until_complete(task.started.wait())
    loop.run_until_complete(asyncio.sleep(0))  # to where it waits
    loop.close()
    del lost, loop, task

    collect_within_a_task()

    assert ref() is None
    assert len(telemetry.observer._begun) == 0
    assert telemetry.attributes("error.type") == ["GeneratorExit"]
    telemetry.assert_settled()


# Settings


async def test_providers_are_those_of_the_app_unless_others_are_given(telemetry: Telemetry) -> None:
    """By the dictionary that FastAPI takes."""
    other = Telemetry()
    observer = OpenTelemetryObserver(
        telemetry={
            "tracer_provider": telemetry.tracer_provider,
            "meter_provider": telemetry.meter_provider,
        },
        meter_provider=other.meter_provider,
    )
    async with Supervisor(observers=[observer]) as supervisor:
        supervisor.schedule(couple)
        await idle(supervisor)

    assert (telemetry.names, other.names) == (["couple"], [])
    assert (telemetry.total("started"), other.total("started")) == (0, 1)


@pytest.mark.parametrize("signal", ["tracing", "metrics"])
async def test_what_the_app_has_switched_off_is_off(signal: str, telemetry: Telemetry) -> None:
    """No spans, or no metrics; and the request's own span is left alone."""
    observer = OpenTelemetryObserver(
        telemetry={signal: False},
        tracer_provider=telemetry.tracer_provider,
        meter_provider=telemetry.meter_provider,
    )
    async with Supervisor(observers=[observer]) as supervisor:
        with telemetry.tracer.start_as_current_span("request") as span:
            await supervisor.schedule(couple).wait()
            await let_others_run()
            assert span.is_recording()

    is_traced = signal != "tracing"
    assert ("couple" in telemetry.names, telemetry.total("started")) == (is_traced, not is_traced)


async def test_without_a_provider_tasks_run_as_ever() -> None:
    """The API by itself does nothing."""
    async with Supervisor(observers=[OpenTelemetryObserver()]) as supervisor:
        task = supervisor.schedule(couple)
        await task.wait()
        assert task.status == "succeeded"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"telemetry": FastAPI()}, "telemetry: expected the dictionary .* got FastAPI"),
        ({"tracer_provider": 5}, "tracer_provider=5: expected an object with get_tracer"),
        ({"meter_provider": 5}, "meter_provider=5: expected an object with get_meter"),
        ({"telemetry": {"meter_provider": 5}}, "meter_provider=5: expected an object"),
    ],
)
def test_what_is_no_provider_is_refused(settings: dict[str, Any], match: str) -> None:
    """At once, and not when the first task runs."""
    with pytest.raises(InvalidSettingError, match=match):
        OpenTelemetryObserver(**settings)


# The package


def run(code: str) -> str:
    """Run Python in a process of its own, and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=PATIENCE * 6
    ).stdout


WHO_IMPORTS = """
import builtins

importers = set()
original = builtins.__import__

def recording(name, globals=None, locals=None, fromlist=(), level=0):
    if name.partition(".")[0] == "opentelemetry" and not level:
        importers.add((globals or {}).get("__name__", ""))
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = recording

from fastapi import FastAPI
from fastapi.testclient import TestClient
import fastapi_tasks

app = FastAPI()
fastapi_tasks.add_tasks(app)

@app.get("/")
async def endpoint(tasks: fastapi_tasks.Tasks) -> None:
    tasks.after_response.schedule(print, end="")

with TestClient(app) as client:
    assert client.get("/").status_code == 200
print(sorted(name for name in importers if name.startswith("fastapi_tasks")))
import fastapi_tasks.observers.opentelemetry
print(sorted(name for name in importers if name.startswith("fastapi_tasks")))
"""


def test_nothing_of_opentelemetry_is_imported_without_the_observer() -> None:
    """Not by this package; newer FastAPIs do so themselves."""
    assert run(WHO_IMPORTS).splitlines() == ["[]", "['fastapi_tasks.observers.opentelemetry']"]


def test_if_the_package_is_missing_the_error_says_what_to_install() -> None:
    """As it is with a FastAPI that does not bring it."""
    printed = run(
        "import sys, fastapi_tasks\n"
        "for name in [n for n in sys.modules if n.startswith('opentelemetry')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['opentelemetry'] = None\n"
        "try:\n"
        "    import fastapi_tasks.observers.opentelemetry\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)\n"
    )

    assert printed.startswith(f"{MissingPackageError.__name__} fastapi_tasks.observers.")
    assert "pip install 'fastapi-tasks[opentelemetry]'" in printed

"""What travels with a job beside its arguments: OpenTelemetry's trace, and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextvars import ContextVar, copy_context

import pytest
from opentelemetry import baggage, context, trace

from fastapi_tasks import Retry, Supervisor, current_task
from fastapi_tasks.engines.messages import read_message
from fastapi_tasks.engines.trace import context_of
from tests.recording import let_others_run, until
from tests.telemetry import Telemetry

from .memory import MemoryEngine

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class DerailedError(Exception):
    """What goes wrong in this module."""


@pytest.fixture
def telemetry() -> Telemetry:
    """A place of this test's own for spans and metrics."""
    return Telemetry()


def begun_of(telemetry: Telemetry) -> object:
    """Return what the observer remembers of tasks that run."""
    return telemetry.observer._begun


@pytest.mark.parametrize("is_scheduled", [False, True])
async def test_a_job_is_in_the_trace_of_its_caller(
    jobs: MemoryEngine, telemetry: Telemetry, is_scheduled: bool
) -> None:
    """Whoever enqueues it, the endpoint or a task: it is one story."""

    @jobs.task(name="couple")
    async def couple() -> None:
        """Succeed."""

    async with Supervisor(engines=[jobs], observers=[telemetry.observer]) as supervisor:
        with telemetry.tracer.start_as_current_span("request") as request:
            if is_scheduled:
                job = await supervisor.schedule(couple).wait()
            else:
                job = await jobs.enqueue(couple)
        await job.wait()
        await let_others_run()

    trace_id = request.get_span_context().trace_id
    spans = {
        span.attributes["fastapi_tasks.task.id"]: span
        for span in telemetry.all_spans
        if span.attributes
    }
    assert spans[job.id].context.trace_id == trace_id
    parent = spans[job.id].parent
    assert parent is not None
    others = [span for id_, span in spans.items() if id_ != job.id]
    of_caller = others[0].context if is_scheduled else request.get_span_context()
    assert parent.span_id == of_caller.span_id


async def test_other_context_stays_where_it_is(jobs: MemoryEngine) -> None:
    """A worker is another process; what a job needs is in its arguments."""

    @jobs.task
    async def couple() -> list[str]:
        return [tenant.get(), str(baggage.get_baggage("train"))]

    tenant.set("Ada")
    token = context.attach(baggage.set_baggage("train", "night"))
    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(couple)
        assert await job.wait() == ["nobody", "night"]
    context.detach(token)
    assert "Ada" not in jobs.rows[job.id].text


async def test_without_a_trace_none_travels(jobs: MemoryEngine) -> None:
    """And the job is in none."""

    @jobs.task
    async def couple() -> bool:
        return trace.get_current_span().get_span_context().is_valid

    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(couple)
        assert await job.wait() is False
    assert read_message(jobs.rows[job.id].text).trace == {}


def test_without_opentelemetry_a_trace_is_left_alone() -> None:
    """A caller may have it where the worker has not, or the other way round."""
    code = (
        "import sys\n"
        "from contextvars import Context\n"
        "from fastapi_tasks.engines.trace import context_of, current_trace\n"
        # Newer FastAPIs bring it along, and import it.
        "for name in [n for n in sys.modules if n.startswith('opentelemetry')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['opentelemetry'] = None\n"
        "here = Context()\n"
        "print(current_trace(), context_of({'traceparent': 'x'}, here) is here, len(here))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["{}", "True", "0"]


def test_a_trace_that_is_none_is_ignored() -> None:
    """Propagators make no trace of what they cannot read."""
    here = context_of({"traceparent": "hunter2"}, copy_context())

    assert not here.run(trace.get_current_span).get_span_context().is_valid


async def test_every_attempt_is_a_run_of_its_own(jobs: MemoryEngine, telemetry: Telemetry) -> None:
    """They may be made by several processes, so each one is counted where it ran."""

    @jobs.task(
        name="couple",
        retry=Retry(on=DerailedError, attempts=3, wait_initial=0, wait_jitter=0),
    )
    async def couple() -> None:
        if current_task().attempt < 3:
            raise DerailedError

    async with Supervisor(engines=[jobs], observers=[telemetry.observer]):
        await (await jobs.enqueue(couple)).wait()
        await let_others_run()
        assert begun_of(telemetry) == {}

    assert telemetry.attributes("attempt") == [1, 2, 3]
    assert telemetry.attributes("outcome") == ["retried", "retried", "succeeded"]
    assert telemetry.counts() == {"retried": 2, "succeeded": 1}
    assert telemetry.total("started") == 3
    telemetry.assert_settled()


async def test_an_interrupted_attempt_is_over_too(jobs: MemoryEngine, telemetry: Telemetry) -> None:
    """Nothing is left behind, whatever becomes of the job."""
    begun = asyncio.Event()

    @jobs.task(retry=Retry(on=DerailedError))
    async def couple() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise DerailedError from None

    async with Supervisor(engines=[jobs], observers=[telemetry.observer]):
        await jobs.enqueue(couple)
        await until(begun.is_set)
    assert begun_of(telemetry) == {}
    telemetry.assert_settled()

"""Tasks of registered functions: they are enqueued at their moment, and never run here instead."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import FastAPI

from fastapi_tasks import (
    AddTasksError,
    EngineStateError,
    EngineUnavailableError,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    Tasks,
    TaskStatus,
    add_tasks,
    current_task,
    get_supervisor,
)
from fastapi_tasks.engines import Job, JobOptions
from fastapi_tasks.engines.messages import Message, read_message
from fastapi_tasks.testing import capture_tasks, run_inline
from tests.asgi import LifespanFailedError, lifespan, request
from tests.conftest import BACKENDS
from tests.recording import Observed, let_others_run, ours

from .clocks import on_fake_clock
from .functions import fresh
from .memory import MemoryEngine


class UndeliverableError(Exception):
    """What goes wrong in this module."""


async def mail(letter: int) -> str:
    """Succeed."""
    return f"letter {letter}"


class BusyEngine(MemoryEngine):
    """Takes a job at the second asking."""

    asked = 0

    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        self.asked += 1
        if self.asked == 1:
            raise EngineUnavailableError(str(self), "no answer", instead="Ask again")
        return await super()._enqueue(job_id, message, options)


class SlowEngine(MemoryEngine):
    """Takes a job when it may."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.may_take = anyio.Event()

    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        await self.may_take.wait()
        return await super()._enqueue(job_id, message, options)


def app_with(*engines: MemoryEngine, **settings: Any) -> FastAPI:
    """Return an app with engines."""
    app = FastAPI()
    add_tasks(app, engines=engines, **settings)
    return app


# At its moment


@pytest.mark.parametrize("moment", ["now", "after_route", "after_response"])
async def test_a_registered_function_is_enqueued_at_its_moment(
    jobs: MemoryEngine, moment: str
) -> None:
    """The task is the enqueueing's, and gives the job."""
    func = jobs.task(name="mail")(fresh(mail))
    app, scheduled = app_with(jobs), list[Task]()

    @app.get("/")
    async def send(tasks: Tasks) -> int:
        batch = tasks if moment == "now" else getattr(tasks, moment)
        scheduled.append(batch.schedule(func, letter=3))
        await let_others_run()
        return len(jobs.rows)

    async with lifespan(app):
        response = await request(app, "/")
        assert response.json() == (moment == "now")
        (task,) = scheduled
        job = await task.wait()
        assert isinstance(job, Job)
        assert (task.name, task.moment, task.status) == ("mail", moment, TaskStatus.SUCCEEDED)
        assert job.id != task.id
        assert await job.wait() == "letter 3"


async def test_a_sync_endpoint_may_schedule_one(jobs: MemoryEngine) -> None:
    """From its thread."""
    func = jobs.task(fresh(mail))
    app, scheduled = app_with(jobs), list[Task]()

    @app.get("/")
    def send(tasks: Tasks) -> None:
        scheduled.append(tasks.schedule(func, 3))

    async with lifespan(app):
        await request(app, "/")
        job = await scheduled[0].wait()
        assert await job.wait() == "letter 3"


async def test_a_failed_request_enqueues_nothing(jobs: MemoryEngine) -> None:
    """What waited for its response is dropped, as any task is."""
    func = jobs.task(fresh(mail))
    app, scheduled = app_with(jobs), list[Task]()

    @app.get("/")
    async def send(tasks: Tasks) -> None:
        scheduled.append(tasks.after_response.schedule(func, 3))
        scheduled.append(tasks.after_response.task(run_if="error").schedule(func, 4))
        raise UndeliverableError

    async with lifespan(app):
        with pytest.raises(UndeliverableError):
            await request(app, "/")
        dropped, enqueued = scheduled
        assert dropped.status is TaskStatus.CANCELLED
        assert await (await enqueued.wait()).wait() == "letter 4"
    assert len(jobs.rows) == 1


async def test_a_job_may_schedule_others(jobs: MemoryEngine) -> None:
    """On the supervisor that it runs on."""
    func = jobs.task(fresh(mail))

    @jobs.task
    async def mail_twice() -> None:
        for letter in range(2):
            await get_supervisor().schedule(func, letter).wait()

    async with Supervisor(engines=[jobs]):
        await (await jobs.enqueue(mail_twice)).wait()
    assert len(jobs.rows) == 3


# What the configuration is for


@on_fake_clock
async def test_the_delay_is_the_job_s(jobs: MemoryEngine) -> None:
    """The job is durable at once, and waits for its time where no shutdown can take it."""
    func = jobs.task(fresh(mail))
    async with Supervisor(engines=[jobs]) as supervisor:
        begun = anyio.current_time()
        job = await supervisor.task(delay=60).schedule(func, 3).wait()
        assert anyio.current_time() - begun < 1
        message = read_message(jobs.rows[job.id].text)
        assert message.due - message.created == 60
        await job.wait()
        assert anyio.current_time() - begun >= 60


async def test_the_function_s_own_policy_is_the_job_s(jobs: MemoryEngine) -> None:
    """Its retry, limit and handler are for the worker; the call's are for the enqueueing."""
    func = jobs.task(retry=Retry(on=UndeliverableError), timeout=9, on_error=print)(fresh(mail))
    async with Supervisor(engines=[jobs], config=TaskConfig(on_error=repr)) as supervisor:
        plain = supervisor.schedule(func, 3)
        bound = supervisor.task(name="post", timeout=2, shield=False).schedule(func, 3)
        await plain.wait()
        await bound.wait()

    assert plain.config == TaskConfig(name=plain.name, shield=True, on_error=repr)
    assert bound.config == TaskConfig(name="post", timeout=2, shield=False, on_error=repr)


@pytest.mark.parametrize(("options", "is_kept"), [({}, True), ({"shield": False}, False)])
async def test_a_shutdown_waits_until_the_job_is_enqueued(
    options: dict[str, Any], is_kept: bool
) -> None:
    """What was promised is not lost, if nobody says otherwise."""
    jobs = SlowEngine()
    func = jobs.task(fresh(mail))

    async with Supervisor(engines=[jobs]) as supervisor:
        task = supervisor.task(**options).schedule(func, 3)
        await task.started.wait()
        asyncio.get_running_loop().call_later(0.01, jobs.may_take.set)

    assert (task.status is TaskStatus.SUCCEEDED) is is_kept
    assert len(jobs.rows) == is_kept


async def test_a_failed_enqueueing_is_a_failed_task(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and its handler is told: never is it silent."""
    handled: list[tuple[Task, Exception]] = []
    jobs = BusyEngine()
    func = jobs.task(name="mail")(fresh(mail))
    async with Supervisor(engines=[jobs]) as supervisor:
        task = supervisor.task(on_error=lambda *what: handled.append(what)).schedule(func, 3)
        with pytest.raises(EngineUnavailableError, match="no answer"):
            await task.wait()

    assert [(failed is task, type(error)) for failed, error in handled] == [
        (True, EngineUnavailableError)
    ]
    (record,) = (r for r in ours(caplog) if r.levelname == "ERROR")
    assert record.message == f"Task mail ({task.id}) failed in attempt 1"


async def test_a_failed_enqueueing_can_be_retried() -> None:
    """By the configuration of the call, or of the app."""
    jobs = BusyEngine()
    func = jobs.task(fresh(mail))
    async with Supervisor(engines=[jobs]) as supervisor:
        patient = supervisor.task(
            retry=Retry(on=EngineUnavailableError, wait_initial=0, wait_jitter=0)
        )
        assert isinstance(await patient.schedule(func, 3).wait(), Job)
    assert jobs.asked == 2
    assert len(jobs.rows) == 1


async def test_enqueueings_are_told_to_observers(jobs: MemoryEngine) -> None:
    """One task enqueues, and another one runs the job."""
    observed = Observed()
    func = jobs.task(name="mail")(fresh(mail))
    async with Supervisor(engines=[jobs], observers=[observed]) as supervisor:
        job = await supervisor.schedule(func, 3).wait()
        await job.wait()
    names = {event.task.id: event.task.name for event in observed.events if event.tasks}
    assert list(names.values()) == ["mail", "mail"]
    assert job.id in names


# What is not started


async def test_an_engine_that_nobody_started_is_an_error_at_schedule(jobs: MemoryEngine) -> None:
    """In the endpoint, and not in a log."""
    func = jobs.task(fresh(mail))
    app = app_with()

    @app.get("/")
    async def send(tasks: Tasks) -> str:
        for batch in (tasks, tasks.after_route, tasks.after_response):
            with pytest.raises(EngineStateError, match=r"add_tasks\(app, engines="):
                batch.schedule(func, 3)
        return "told"

    async with lifespan(app):
        assert (await request(app, "/")).json() == "told"


async def test_an_engine_of_a_mounted_app_is_not_started(
    jobs: MemoryEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lifespan never runs; the log says where to move it."""
    func = jobs.task(fresh(mail))
    inner, outer = app_with(jobs), app_with()
    outer.mount("/inner", inner)

    @inner.get("/")
    async def send(tasks: Tasks) -> str:
        with pytest.raises(EngineStateError):
            tasks.schedule(func, 3)
        return "told"

    async with lifespan(outer):
        assert (await request(outer, "/inner/")).json() == "told"
    assert "of the arguments of its add_tasks(), only config counts" in caplog.text


async def test_an_engine_of_the_outer_app_serves_the_mounted_one(jobs: MemoryEngine) -> None:
    """As its supervisor does."""
    func = jobs.task(fresh(mail))
    inner, outer = FastAPI(), app_with(jobs)
    add_tasks(inner)
    outer.mount("/inner", inner)

    @inner.get("/")
    async def send(tasks: Tasks) -> str:
        return await (await tasks.schedule(func, 3).wait()).wait()

    async with lifespan(outer):
        assert (await request(outer, "/inner/")).json() == "letter 3"


@pytest.mark.parametrize("anyio_backend", [BACKENDS[-1]])
async def test_an_app_with_engines_does_not_start_on_trio(jobs: MemoryEngine) -> None:
    """It says so at its start-up."""
    await _fails_to_start(app_with(jobs), EngineStateError, "trio's")


async def test_an_app_does_not_start_without_its_engine() -> None:
    """A server that went on would lose what it promises."""

    class Unreachable(MemoryEngine):
        @asynccontextmanager
        async def _connected(self) -> AsyncGenerator[None, None]:
            raise EngineUnavailableError(str(self), "no answer", instead="Look at it")
            yield

    first, second = MemoryEngine(), Unreachable()
    await _fails_to_start(app_with(first, second), EngineUnavailableError, "no answer")
    assert not first.is_started


async def _fails_to_start(app: FastAPI, kind: type[Exception], told: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(kind, match=told):
        await app({"type": "lifespan", "state": {}}, receive, send)
    assert [message["type"] for message in sent][:1] == ["lifespan.startup.failed"]
    assert told in sent[0]["message"]
    with pytest.raises((ExceptionGroup, LifespanFailedError)):
        async with lifespan(app):
            pass  # pragma: no cover - it does not start


async def test_engines_end_after_the_tasks_and_before_the_app(jobs: MemoryEngine) -> None:
    """So tasks can enqueue while they end, and jobs have all that the app has opened."""
    happened: list[str] = []

    def telling(name: str) -> Callable[..., Any]:
        @asynccontextmanager
        async def resources(*_: Any) -> AsyncGenerator[None, None]:
            happened.append(f"{name} opened")
            yield
            happened.append(f"{name} closed")

        return resources

    first, second = (MemoryEngine(worker=True, lifespan=telling(n)) for n in ("first", "second"))
    func = first.task(fresh(mail))
    app = FastAPI(lifespan=telling("app"))
    add_tasks(app, engines=[first, second])

    async def farewell() -> None:
        supervisor = get_supervisor()
        while supervisor.is_running:
            await let_others_run()
        assert isinstance(await supervisor.schedule(func, 3).wait(), Job)
        happened.append("task is over")

    async with lifespan(app):
        get_supervisor(app).task(shield=True).schedule(farewell)
        await let_others_run()

    assert happened == [
        "first opened",
        "second opened",
        "app opened",
        "task is over",
        "second closed",
        "first closed",
        "app closed",
    ]
    assert len(first.rows) == 1


# add_tasks


def test_engines_belong_to_the_first_add_tasks(jobs: MemoryEngine) -> None:
    """The same ones once more are no harm; others are told."""
    app = app_with(jobs)
    add_tasks(app, engines=[jobs])

    with pytest.raises(AddTasksError, match="one add_tasks"):
        add_tasks(app, engines=[MemoryEngine()])
    assert get_supervisor(app).settings.engines == (jobs,)
    assert "memory" not in repr(get_supervisor(app).settings)


# In tests


def counted(name: str) -> str:
    """Say what it is called with."""
    return f"{name} in attempt {current_task().attempt}"


async def test_a_test_runs_the_function_itself(jobs: MemoryEngine) -> None:
    """It needs no engine, and sees what the function does."""
    func = jobs.task(name="count")(fresh(counted))
    app, scheduled = app_with(jobs), list[Task]()

    @app.get("/")
    async def send(tasks: Tasks) -> None:
        scheduled.append(tasks.after_response.schedule(func, "Ada"))

    with run_inline(app):
        await request(app, "/")
        assert [task.result() for task in scheduled] == ["Ada in attempt 1"]
    with capture_tasks(app) as captured:
        await request(app, "/")
        (task,) = captured
        assert (task.func, task.args, task.name) == (func, ("Ada",), "count")
    assert jobs.rows == {}


async def test_a_partial_is_claimed_as_its_function(jobs: MemoryEngine) -> None:
    """Else it would run here, and nobody would notice."""
    func = jobs.task(name="mail")(fresh(mail))
    async with Supervisor(engines=[jobs]) as supervisor:
        task = supervisor.schedule(functools.partial(func, 3))
        assert task.name == "mail"
        assert await (await task.wait()).wait() == "letter 3"

"""How long a task waits after its moment, before it begins."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Literal

import anyio
import anyio.lowlevel
import pytest
from fastapi import FastAPI

from fastapi_tasks import (
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskEventKind,
    Tasks,
    TaskStatus,
    current_task,
    get_supervisor,
    task,
)

from . import asgi, load
from .clocks import on_fake_clocks  # noqa: F401 - it is this module's anyio_backend
from .conftest import on_real_clocks
from .recording import Observed, idle, let_others_run, until


class TideError(Exception):
    """What goes wrong in this module's bay."""


class Clock(list[float]):
    """The moments at which its function has begun, counted from when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.start = anyio.current_time()

    async def __call__(self) -> None:
        """Note the time."""
        self.append(anyio.current_time() - self.start)


def nothing() -> None:
    """Be a sync function."""


# When a delayed task begins


@pytest.mark.parametrize("delay", [90, 90.0, timedelta(minutes=1.5)])
async def test_a_task_begins_when_its_delay_has_passed(delay: float | timedelta) -> None:
    """Not before, and not much later."""
    async with Supervisor() as supervisor:
        clock = Clock()
        await supervisor.task(delay=delay).schedule(clock).wait()

    assert clock == [pytest.approx(90)]


async def test_a_sync_task_begins_when_its_delay_has_passed() -> None:
    """It takes no thread before that."""
    async with Supervisor(threads=1) as supervisor:
        began = anyio.current_time()
        late = supervisor.task(delay=90).schedule(nothing)
        quick = supervisor.schedule(nothing)
        await until(lambda: quick.status is TaskStatus.SUCCEEDED)
        assert late.status is TaskStatus.PENDING
        await late.wait()
        assert anyio.current_time() - began == pytest.approx(90)


@pytest.mark.parametrize("moment", ["immediate", "after_route", "after_response"])
async def test_the_delay_counts_from_the_tasks_moment(
    moment: Literal["immediate", "after_route", "after_response"], app: FastAPI, observed: Observed
) -> None:
    """And not from the call of schedule, which may be long before."""
    clocks: list[Clock] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        clocks.append(Clock())
        place = tasks if moment == "immediate" else getattr(tasks, moment)
        place.task(delay=100).schedule(clocks[0])
        await anyio.sleep(10)

    async def send_slowly(message: Any) -> None:
        await anyio.sleep(10)

    async with asgi.lifespan(app):
        await asgi.request(app, "/", on_send=send_slowly)
        await observed.events[0].task.wait()

    expected = {"immediate": 100, "after_route": 110, "after_response": 130}[moment]
    assert clocks[0] == [pytest.approx(expected)]


@task(delay=50)
async def ebb() -> float:
    """Have a delay of its own."""
    return anyio.current_time()


@pytest.mark.parametrize(("delay", "moment"), [(0, 0), (timedelta(0), 0), (7, 7), (None, 50)])
async def test_a_call_takes_back_the_functions_delay(
    delay: float | timedelta | None, moment: float
) -> None:
    """Zero is an answer, and not the same as no answer."""
    async with Supervisor(config=TaskConfig(delay=3)) as supervisor:
        began = anyio.current_time()
        assert await supervisor.task(delay=delay).schedule(ebb).wait() - began == pytest.approx(
            moment
        )


async def test_a_retry_does_not_wait_for_the_delay_again() -> None:
    """It stands before the first attempt only."""
    clock = Clock()

    async def fail() -> None:
        await clock()
        raise TideError

    retry = Retry(on=TideError, attempts=3, wait_initial=1, wait_jitter=0)
    async with Supervisor() as supervisor:
        task = supervisor.task(delay=100, retry=retry).schedule(fail)
        with pytest.raises(TideError):
            await task.wait()

    assert clock == [pytest.approx(moment) for moment in (100, 101, 103)]


async def test_a_retrys_time_does_not_begin_with_the_delay() -> None:
    """It counts from the first attempt."""
    clock = Clock()

    async def fail() -> None:
        await clock()
        raise TideError

    retry = Retry(on=TideError, attempts=2, wait_initial=1, wait_jitter=0, timeout=5)
    async with Supervisor() as supervisor:
        task = supervisor.task(delay=100, retry=retry).schedule(fail)
        with suppress(TideError):
            await task.wait()

    assert len(clock) == 2


async def test_a_delayed_task_waits_for_no_place() -> None:
    """It takes one when it is about to begin."""
    limiter = anyio.CapacityLimiter(1)
    async with Supervisor() as supervisor:
        limited = supervisor.task(limiter=limiter)
        late = limited.task(delay=100).schedule(nothing)
        await limited.schedule(anyio.sleep, 10).wait()
        assert limiter.borrowed_tokens == 0
        await late.wait()


async def test_a_call_of_the_task_has_no_delay() -> None:
    """``await task()`` runs the function, and nothing around it."""
    async with Supervisor() as supervisor:
        task = supervisor.task(delay=100).schedule(ebb)
        assert await task() == pytest.approx(anyio.current_time())
        assert task.status is TaskStatus.PENDING
        task.cancel()


# What it is until then


async def test_a_delayed_task_is_pending(observed: Observed) -> None:
    """Nothing of it has begun, and whoever waits for that goes on waiting."""
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.task(delay=100).schedule(ebb)
        started = task.started
        await anyio.sleep(99)
        assert (task.status, task.attempt, started.is_set()) == (TaskStatus.PENDING, 0, False)
        assert observed.kinds(task) == [TaskEventKind.SCHEDULED]
        assert supervisor.running == (task,)
        await started.wait()
        await task.wait()

    assert observed.kinds(task)[1] == TaskEventKind.STARTED


async def test_a_delayed_task_knows_itself_and_its_context() -> None:
    """The delay changes nothing of what its function sees."""
    tide: ContextVar[str] = ContextVar("tide")

    async def look() -> tuple[str, Task]:
        return tide.get(), current_task()

    async with Supervisor() as supervisor:
        token = tide.set("high")
        task = supervisor.task(delay=100).schedule(look)
        tide.reset(token)
        assert await task.wait() == ("high", task)


@pytest.mark.parametrize("shield", [True, False])
async def test_a_delayed_task_can_be_cancelled(shield: bool, observed: Observed) -> None:
    """At once; it never begins."""
    clock = Clock()
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.task(delay=100, shield=shield).schedule(clock)
        await anyio.sleep(50)
        assert task.cancel()
        await task.wait()
        assert (task.status, anyio.current_time() - clock.start) == (
            TaskStatus.CANCELLED,
            pytest.approx(50),
        )
        await let_others_run()
        assert supervisor.running == ()
        assert not task.cancel()

    assert (clock, task.attempt) == ([], 0)
    assert observed.kinds(task) == [TaskEventKind.SCHEDULED, TaskEventKind.CANCELLED]


@pytest.mark.parametrize("first", ["the task", "the canceller"])
async def test_a_task_that_is_cancelled_as_its_delay_ends_is_cancelled(first: str) -> None:
    """Unless it has begun, and is over."""
    async with Supervisor() as supervisor:
        clock = Clock()
        asked: list[bool] = []
        tasks: list[Task] = []

        async def cancel() -> None:
            await anyio.sleep(100)
            asked.append(tasks[0].cancel())

        async with anyio.create_task_group() as group:
            if first == "the task":
                tasks.append(supervisor.task(delay=100).schedule(clock))
                await let_others_run()
            group.start_soon(cancel)
            await let_others_run()
            if first != "the task":
                tasks.append(supervisor.task(delay=100).schedule(clock))
        await tasks[0].wait()

    expected = TaskStatus.CANCELLED if asked == [True] else TaskStatus.SUCCEEDED
    assert tasks[0].status is expected
    assert len(clock) == (0 if asked == [True] else 1)


# When the app ends first


async def test_an_unshielded_task_whose_delay_has_not_passed_never_starts() -> None:
    """It is cancelled with the others, at once without a grace, and reported so."""
    clock = Clock()
    supervisor = Supervisor()
    await supervisor.start()
    task = supervisor.task(delay=100).schedule(clock)
    await let_others_run()

    report = await supervisor.drain()

    assert (report.never_started, report.cancelled, report.duration) == ((task,), (), 0)
    assert (clock, task.status) == ([], TaskStatus.CANCELLED)


@pytest.mark.parametrize(("delay", "starts"), [(9, True), (11, False)])
async def test_a_delay_that_ends_within_the_grace_is_one(delay: float, starts: bool) -> None:
    """The task was taken before the drain began, so it may begin."""
    clock = Clock()
    supervisor = Supervisor(grace=10)
    await supervisor.start()
    task = supervisor.task(delay=delay).schedule(clock)

    report = await supervisor.drain()

    assert (report.finished == (task,), report.never_started == (task,)) == (starts, not starts)
    assert len(clock) == int(starts)


async def test_a_shielded_task_waits_for_the_end_of_its_delay_in_the_drain() -> None:
    """And runs then: without a deadline, a delay of a day holds up the end for a day."""
    clock = Clock()
    supervisor = Supervisor(config=TaskConfig(shield=True))
    await supervisor.start()
    task = supervisor.task(delay=24 * 3600).schedule(clock)

    report = await supervisor.drain()

    assert (report.finished, clock) == ((task,), [pytest.approx(24 * 3600)])


async def test_a_shielded_task_whose_delay_is_too_long_never_starts() -> None:
    """It is given up with the others when the deadline is near."""
    clock = Clock()
    supervisor = Supervisor(config=TaskConfig(shield=True), shutdown_timeout=25)
    await supervisor.start()
    task = supervisor.task(delay=100).schedule(clock)

    report = await supervisor.drain()

    assert (report.never_started, report.duration) == ((task,), pytest.approx(20))
    assert clock == []


async def test_a_task_that_waits_for_its_moment_has_no_delay_after_the_end(app: FastAPI) -> None:
    """What is scheduled in a drain, is dropped at once if it is not shielded."""
    async with asgi.lifespan(app) as served:
        supervisor = get_supervisor(app)

        async def schedule_late() -> Task:
            await anyio.sleep(1)
            return supervisor.task(delay=1).schedule(nothing)

        last = supervisor.task(shield=True).schedule(schedule_late)
        await last.started.wait()
        await served.shutdown()

    assert last.result().status is TaskStatus.CANCELLED


# What is left of it


class Shell:
    """What a context variable holds."""


@on_real_clocks
@pytest.mark.parametrize("cancelled", [True, False])
async def test_the_timer_of_a_task_that_is_over_keeps_nothing_alive(cancelled: bool) -> None:
    """Neither the task nor what was in its context, which may be large or a connection."""
    found: ContextVar[Shell] = ContextVar("found")
    async with Supervisor() as supervisor, anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 60)  # asyncio forgets a cancelled timer that is the next one
        await let_others_run()
        gc.collect()
        gc.disable()
        try:
            with load.silence():
                shell = Shell()
                token = found.set(shell)
                task = supervisor.task(delay=3600 if cancelled else 0.001).schedule(nothing)
                found.reset(token)
                references = weakref.ref(task), weakref.ref(shell)
                del shell, token
                await let_others_run()
                if cancelled:
                    task.cancel()
                del task
                await idle(supervisor)
                await until(lambda: [reference() for reference in references] == [None, None])
        finally:
            gc.enable()
            group.cancel_scope.cancel()


@pytest.mark.parametrize("place", [lambda tasks: tasks, lambda tasks: tasks.task(name="late")])
async def test_a_delay_is_free_when_it_is_not_used(
    place: Callable[[Any], Any], app: FastAPI
) -> None:
    """A task without one has run to its first await when the endpoint has returned."""
    begun: list[bool] = []

    async def begin() -> None:
        begun.append(True)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        place(tasks.task(delay=0)).schedule(begin)

    async with asgi.lifespan(app):
        exchange: list[bool] = []

        async def look(message: Any) -> None:
            exchange.append(bool(begun))

        await asgi.request(app, "/", on_send=look)

    assert exchange[0]

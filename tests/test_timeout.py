"""How long an attempt may take: who is cut off when, and what goes on in threads after that."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import math
import pickle
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from fastapi_tasks import (
    FastAPITasksError,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    TaskStatus,
    TaskTimeoutError,
    current_task,
    task,
)

from . import load
from .clocks import (
    FAKE_CLOCKS,
    Backend,
    on_fake_clocks,  # noqa: F401 - it is this module's anyio_backend
)
from .conftest import on_asyncio, on_real_clocks
from .recording import Observed, idle, let_others_run, ours, until

AGAIN = Retry(on=Exception, attempts=2, wait_initial=0, wait_jitter=0)
"""One more attempt, at once."""


class FrostError(Exception):
    """What goes wrong in this module's garden."""


async def over(task: Task) -> BaseException | None:
    """Wait until a task is over, and return its error."""
    with suppress(Exception):
        await task.wait()
    return None if task.status is TaskStatus.CANCELLED else task.exception()


async def ripen() -> None:
    """Take for ever, and leave no timer behind."""
    await anyio.Event().wait()


@asynccontextmanager
async def nothing_collected() -> AsyncIterator[None]:
    """Leave it to the counting of references to free what is not needed.

    And have a timer that is due before all others: asyncio forgets a cancelled one, and what it
    refers to, when it is the next one.
    """
    gc.collect()
    gc.disable()
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 60)
            await let_others_run()
            with load.silence():
                yield
            group.cancel_scope.cancel()
    finally:
        gc.enable()


# A function that takes too long


@pytest.mark.parametrize("limit", [30, 30.0, timedelta(seconds=30)])
async def test_a_function_that_takes_too_long_is_cancelled_and_has_failed(
    limit: float | timedelta,
) -> None:
    """At its time, not at an await that it comes to later."""
    cancelled_at: list[float] = []

    async def grow() -> None:
        try:
            await ripen()
        finally:
            cancelled_at.append(anyio.current_time())

    async with Supervisor() as supervisor:
        began = anyio.current_time()
        task = supervisor.task(timeout=limit).schedule(grow)
        with pytest.raises(TaskTimeoutError):
            await task.wait()

    assert task.status is TaskStatus.FAILED
    assert cancelled_at == [pytest.approx(began + 30)]


async def test_a_function_that_is_quick_enough_notices_nothing() -> None:
    """A timeout is a limit and not a delay."""
    async with Supervisor() as supervisor:
        began = anyio.current_time()
        task = supervisor.task(timeout=30).schedule(anyio.sleep, 29)
        await task.wait()
        took = anyio.current_time() - began

    assert (task.status, took) == (TaskStatus.SUCCEEDED, pytest.approx(29))


async def test_the_result_is_that_of_the_function() -> None:
    """Whichever way it is run."""

    async def pick(fruit: str) -> str:
        await anyio.lowlevel.checkpoint()
        return fruit

    async with Supervisor(config=TaskConfig(timeout=30)) as supervisor:
        assert await supervisor.schedule(pick, "pear").wait() == "pear"


@task(timeout=5)
async def water() -> str:
    """Take longer than its own configuration allows."""
    await anyio.sleep(10)
    return "wet"


@pytest.mark.parametrize("limit", [math.inf, 20, timedelta(minutes=1), timedelta.max])
async def test_a_call_takes_back_the_functions_timeout(limit: float | timedelta) -> None:
    """An infinite one is an answer, and not the same as no answer."""
    async with Supervisor() as supervisor:
        cut_off, done = supervisor.schedule(water), supervisor.task(timeout=limit).schedule(water)
        assert isinstance(await over(cut_off), TaskTimeoutError)
        assert await done.wait() == "wet"


async def test_the_app_can_set_a_timeout_for_all() -> None:
    """A function takes it back for itself."""

    @task(timeout=math.inf)
    async def hibernate() -> None:
        await anyio.sleep(3600)

    async with Supervisor(config=TaskConfig(timeout=5)) as supervisor:
        kept, cut_off = supervisor.schedule(hibernate), supervisor.schedule(anyio.sleep, 3600)
        assert isinstance(await over(cut_off), TaskTimeoutError)
        assert await over(kept) is None


# From when it counts


async def test_each_attempt_has_the_whole_time() -> None:
    """What the attempts before it have taken does not count."""
    moments: list[float] = []

    async def grow() -> str:
        moments.append(anyio.current_time())
        await anyio.sleep(11 - 2 * len(moments))
        return "grown"

    retry = Retry(on=TimeoutError, attempts=3, wait_initial=1, wait_jitter=0)
    async with Supervisor() as supervisor:
        began = anyio.current_time()
        task = supervisor.task(timeout=6, retry=retry).schedule(grow)
        assert await task.wait() == "grown"

    assert [moment - began for moment in moments] == [pytest.approx(t) for t in (0, 7, 15)]
    assert task.attempt == 3


async def test_the_delay_does_not_count() -> None:
    """Time begins with the function."""
    async with Supervisor() as supervisor:
        task = supervisor.task(delay=100, timeout=10).schedule(anyio.sleep, 9)
        assert await over(task) is None


async def test_the_wait_for_a_place_does_not_count() -> None:
    """However long the queue is."""
    limiter = anyio.CapacityLimiter(1)
    async with Supervisor() as supervisor:
        limited = supervisor.task(limiter=limiter, timeout=10)
        tasks = [limited.schedule(anyio.sleep, 9) for _ in range(4)]
        assert [await over(task) for task in tasks] == [None] * 4


async def test_the_wait_for_a_thread_does_not_count() -> None:
    """It begins when the thread does."""
    first, second = threading.Event(), threading.Event()

    async def open_gate() -> None:
        await anyio.sleep(100)
        first.set()

    async with Supervisor(threads=1) as supervisor:
        began = anyio.current_time()
        await supervisor.schedule(first.wait).started.wait()
        task = supervisor.task(timeout=10).schedule(second.wait)
        supervisor.schedule(open_gate)
        error = await over(task)
        moment = anyio.current_time() - began
        second.set()
        await idle(supervisor)

    assert isinstance(error, TaskTimeoutError)
    assert moment == pytest.approx(110)


# Its error


async def test_the_error_says_which_task_it_was_and_how_long_it_had() -> None:
    """It is what Python calls a timeout, and an error of this package."""
    async with Supervisor() as supervisor:
        task = supervisor.task(name="compost", timeout=timedelta(minutes=1.5)).schedule(ripen)
        error = await over(task)

    assert isinstance(error, TimeoutError)
    assert isinstance(error, FastAPITasksError)
    assert str(error) == f"compost ({task.id}) did not end within 90 s"


@pytest.mark.parametrize(
    "copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy]
)
async def test_the_error_can_be_copied(copied: Callable[[BaseException], BaseException]) -> None:
    """Error trackers and process pools do."""
    async with Supervisor() as supervisor:
        error = await over(supervisor.task(timeout=1).schedule(ripen))
    assert error is not None

    again = copied(error)

    assert type(again) is TaskTimeoutError
    assert str(again) == str(error)


async def test_the_errors_cause_shows_where_the_function_was() -> None:
    """That is where to look for what takes so long; how it came to be called is left out."""

    async def grow() -> None:
        await ripen()

    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5).schedule(grow)
        await idle_after(supervisor, 5)
    error = task.exception()
    assert error is not None

    assert isinstance(error.__cause__, anyio.get_cancelled_exc_class())
    frames = [frame.name for frame in traceback.extract_tb(error.__cause__.__traceback__)]
    assert frames[:2] == ["grow", "ripen"]
    assert (error.__traceback__, error.__context__) == (None, None)


async def test_a_timeout_is_one_record_with_the_place_in_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Like every other failure."""
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5).schedule(ripen)
        await over(task)

    (record,) = ours(caplog)
    assert record.getMessage() == f"Task ripen ({task.id}) failed in attempt 1"
    assert "in ripen" in caplog.text


# Retries


@pytest.mark.parametrize(
    "on",
    [
        TimeoutError,
        TaskTimeoutError,
        FastAPITasksError,
        Exception,
        (FrostError, TimeoutError),
        lambda error: isinstance(error, TaskTimeoutError),
    ],
)
async def test_a_timeout_is_retried_if_its_kind_is(on: Any) -> None:
    """It is an error like others."""
    retry = Retry(on=on, attempts=3, wait_initial=0, wait_jitter=0)
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5, retry=retry).schedule(ripen)
        await over(task)
        assert anyio.current_time() == pytest.approx(15)

    assert (task.status, task.attempt) == (TaskStatus.FAILED, 3)


@pytest.mark.parametrize("on", [FrostError, (OverflowError, FrostError), lambda error: False])
async def test_a_timeout_is_not_retried_if_its_kind_is_not(on: Any) -> None:
    """The first is the last then."""
    retry = Retry(on=on, attempts=3, wait_initial=0, wait_jitter=0)
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5, retry=retry).schedule(ripen)
        await over(task)

    assert (task.status, task.attempt) == (TaskStatus.FAILED, 1)


# What is not a timeout


async def test_a_cancelled_task_has_not_run_out_of_time(observed: Observed) -> None:
    """Its error handler is not called, and it is not retried."""
    handle = Mock()
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.task(timeout=10, retry=AGAIN, on_error=handle).schedule(ripen)
        await anyio.sleep(5)
        assert task.cancel()
        await task.wait()

    assert (task.status, task.attempt, handle.called) == (TaskStatus.CANCELLED, 1, False)
    assert observed.kinds(task)[-1] == TaskEventKind.CANCELLED


@pytest.mark.parametrize("first", ["the task", "the canceller"])
@pytest.mark.parametrize("retry", [None, AGAIN])
async def test_a_cancellation_in_the_moment_of_the_timeout_is_one_or_the_other(
    first: str, retry: Retry | None
) -> None:
    """Who was told that the task is being cancelled, gets a cancelled task."""
    asked: list[bool] = []
    async with Supervisor() as supervisor:
        tasks: list[Task] = []

        async def cancel() -> None:
            await anyio.sleep(10)
            asked.append(tasks[0].cancel())

        def start() -> None:
            tasks.append(supervisor.task(timeout=10, retry=retry).schedule(ripen))

        async with anyio.create_task_group() as group:
            if first == "the task":
                start()
                await let_others_run()
            group.start_soon(cancel)
            await let_others_run()
            if first != "the task":
                start()
        await over(tasks[0])
        await idle(supervisor)

    (task,) = tasks
    attempts = 1 if retry is None else 2
    if asked == [True]:
        assert task.status is TaskStatus.CANCELLED
    else:
        assert (task.status, task.attempt) == (TaskStatus.FAILED, attempts)


async def test_a_task_that_is_cancelled_in_its_clean_up_is_cancelled() -> None:
    """Somebody asked for it before the attempt had failed."""

    async def grow() -> None:
        try:
            await ripen()
        finally:
            current_task().cancel()

    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5, retry=AGAIN).schedule(grow)
        await task.wait()

    assert (task.status, task.attempt) == (TaskStatus.CANCELLED, 1)


@pytest.mark.parametrize("shield", [True, False])
async def test_a_shutdown_is_not_a_timeout(shield: bool) -> None:
    """Nor the other way round: each is what it is, whichever comes first."""
    supervisor = Supervisor(grace=10, shutdown_timeout=40, config=TaskConfig(shield=shield))
    await supervisor.start()
    slow, quick = (supervisor.task(timeout=t).schedule(ripen) for t in (100, 5))
    await let_others_run()

    report = await supervisor.drain()

    assert (slow.status, quick.status) == (TaskStatus.CANCELLED, TaskStatus.FAILED)
    assert (report.cancelled, report.finished) == ((slow,), (quick,))


async def test_a_shutdown_in_the_moment_of_the_timeout_is_one_or_the_other() -> None:
    """The report and the task's status agree, and no attempt begins any more."""
    supervisor = Supervisor(grace=10)
    await supervisor.start()
    task = supervisor.task(timeout=10, retry=AGAIN).schedule(ripen)
    await task.started.wait()

    report = await supervisor.drain()

    assert task.attempt == 1
    assert (report.cancelled, report.finished) in (((task,), ()), ((), (task,)))
    assert (task in report.cancelled) is (task.status is TaskStatus.CANCELLED)


async def own_error() -> None:
    """Say that something else took too long."""
    raise TimeoutError("of the well")


async def own_limit() -> None:
    """Be cut off by a limit of one's own."""
    with anyio.fail_after(2):
        await ripen()


async def own_asyncio_limit() -> None:
    """Do the same in the manner of asyncio."""
    async with asyncio.timeout(2):
        await ripen()


OWN_LIMITS = [own_error, own_limit, own_asyncio_limit]


@pytest.mark.parametrize("function", OWN_LIMITS)
async def test_a_timeout_of_the_functions_own_is_its_own(
    function: Callable[[], Any], anyio_backend: Backend
) -> None:
    """It is a failure, but not for the task's limit."""
    if function is own_asyncio_limit and anyio_backend[0] == "trio":
        pytest.skip("there is no asyncio")
    async with Supervisor() as supervisor:
        error = await over(supervisor.task(timeout=5).schedule(function))

    assert type(error) is TimeoutError


@pytest.mark.parametrize("function", OWN_LIMITS[1:])
async def test_a_limit_of_the_functions_own_that_is_longer_changes_nothing(
    function: Callable[[], Any], anyio_backend: Backend
) -> None:
    """The inner one does not swallow the outer one's cancellation."""
    if function is own_asyncio_limit and anyio_backend[0] == "trio":
        pytest.skip("there is no asyncio")
    async with Supervisor() as supervisor:
        error = await over(supervisor.task(timeout=1).schedule(function))

    assert type(error) is TaskTimeoutError


async def test_a_function_that_ends_well_all_the_same_has_succeeded() -> None:
    """It was asked to end, and has ended."""

    async def grow() -> str:
        with suppress(anyio.get_cancelled_exc_class()):
            await ripen()
        return "half grown"

    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5, retry=AGAIN).schedule(grow)
        assert await task.wait() == "half grown"
        await idle(supervisor)

    assert (task.status, task.attempt) == (TaskStatus.SUCCEEDED, 1)


@pytest.mark.parametrize("kind", [FrostError, TimeoutError])
async def test_a_function_that_fails_in_its_clean_up_has_failed_with_that(
    kind: type[Exception],
) -> None:
    """A timeout of its own included; it says more than ours would."""
    own = kind("in the roots")

    async def grow() -> None:
        try:
            await ripen()
        finally:
            raise own

    async with Supervisor() as supervisor:
        assert await over(supervisor.task(timeout=5).schedule(grow)) is own


async def test_a_function_that_takes_its_time_to_clean_up_has_it() -> None:
    """The timeout asks once; the end is when the function ends."""

    async def grow() -> None:
        try:
            await ripen()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3)

    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5).schedule(grow)
        assert isinstance(await over(task), TaskTimeoutError)
        assert anyio.current_time() == pytest.approx(8)


# Afterwards


async def test_the_error_handler_runs_after_a_timeout_and_may_await() -> None:
    """The cancellation was that of the attempt; it reaches nothing that comes after it."""
    calls: list[BaseException] = []

    async def replant(task: Task, error: Exception) -> None:
        await anyio.sleep(100)
        await anyio.lowlevel.checkpoint()
        calls.append(error)

    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5, on_error=replant).schedule(ripen)
        error = await over(task)
        await idle_after(supervisor, 100)

    assert calls == [error]


async def idle_after(supervisor: Supervisor, seconds: float) -> None:
    """Let time pass, and wait until nothing runs any more."""
    await anyio.sleep(seconds)
    await idle(supervisor)


@pytest.mark.parametrize("anyio_backend", FAKE_CLOCKS[:-1], indirect=True)
async def test_asyncio_counts_no_cancellation_after_a_timeout() -> None:
    """So a later one, of a timeout inside of the handler for example, is told apart again."""
    counts: list[int] = []

    async def replant(task: Task, error: Exception) -> None:
        loops_task = asyncio.current_task()
        assert loops_task is not None
        counts.append(loops_task.cancelling())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await ripen()
        counts.append(loops_task.cancelling())

    async with Supervisor() as supervisor:
        await over(supervisor.task(timeout=5, on_error=replant).schedule(ripen))
        await idle_after(supervisor, 1)

    assert counts == [0, 0]


async def test_a_task_can_be_cancelled_in_the_attempt_after_a_timeout() -> None:
    """Nothing of the first attempt's cancellation is left that could swallow this one."""
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=5, retry=AGAIN).schedule(ripen)
        await anyio.sleep(7)
        assert task.attempt == 2
        task.cancel()
        await task.wait()
        assert anyio.current_time() == pytest.approx(7)

    assert task.status is TaskStatus.CANCELLED


async def test_a_handler_that_runs_after_a_timeout_is_cancelled_at_shutdown(
    observed: Observed,
) -> None:
    """It is as unshielded as its task."""

    async def replant(task: Task, error: Exception) -> None:
        await ripen()

    supervisor = Supervisor(observers=[observed])
    await supervisor.start()
    task = supervisor.task(timeout=5, on_error=replant).schedule(ripen)
    await over(task)
    await let_others_run()

    report = await supervisor.drain()

    assert (report.finished, report.duration) == ((task,), 0)
    assert observed.kinds(task)[-1] == TaskEventKind.HANDLER_FAILED


async def test_the_current_task_is_known_within_a_timeout() -> None:
    """In each attempt, and in the handler."""
    seen: list[Task] = []

    async def grow() -> None:
        seen.append(current_task())
        await ripen()

    async def replant(task: Task, error: Exception) -> None:
        seen.append(current_task())

    config = TaskConfig(timeout=5, delay=1, retry=AGAIN, on_error=replant)
    async with Supervisor() as supervisor:
        task = supervisor.task(config).schedule(grow)
        await over(task)
        await idle(supervisor)

    assert seen == [task] * 3


def plough() -> None:
    """Be quick, in a thread."""


async def plant() -> None:
    """Be quick."""


async def freeze() -> None:
    """Fail."""
    raise FrostError


def freeze_in_thread() -> None:
    """Fail in a thread."""
    raise FrostError


async def give_up_for_frost() -> None:
    """Take too long, and fail when that is said."""
    try:
        await ripen()
    except BaseException:
        raise FrostError from None


@on_real_clocks
@pytest.mark.parametrize("function", [plough, plant, freeze, freeze_in_thread])
@pytest.mark.parametrize(
    "config",
    [
        TaskConfig(timeout=3600),
        TaskConfig(timeout=timedelta.max, retry=AGAIN),
        TaskConfig(timeout=3600, limiter=anyio.CapacityLimiter(1), retry=AGAIN),
    ],
    ids=["timeout", "retry", "limiter"],
)
async def test_the_timer_of_a_task_that_is_over_keeps_nothing_alive(
    function: Callable[[], Any], config: TaskConfig
) -> None:
    """A timer that is not needed any more is there until its time, on asyncio."""
    if config.limiter is not None:  # one belongs to the event loop that it was used in first
        config = TaskConfig(timeout=3600, limiter=anyio.CapacityLimiter(1), retry=AGAIN)
    async with Supervisor() as supervisor, nothing_collected():
        task = supervisor.task(config).schedule(function)
        await idle(supervisor)
        reference = weakref.ref(task)
        del task
        await until(lambda: reference() is None)


class Seed:
    """What a context variable holds."""


seed: ContextVar[Seed] = ContextVar("seed")


@on_real_clocks
@pytest.mark.parametrize("function", [plough, plant])
async def test_the_timer_of_a_task_that_is_over_keeps_no_context_alive(
    function: Callable[[], Any],
) -> None:
    """What was a context variable of the request may be large, or a connection."""
    async with Supervisor() as supervisor, nothing_collected():
        value = Seed()
        token = seed.set(value)
        task = supervisor.task(timeout=3600).schedule(function)
        seed.reset(token)
        reference = weakref.ref(value)
        del value, token
        await idle(supervisor)
        del task
        await until(lambda: reference() is None)


@on_real_clocks
@pytest.mark.parametrize("function", [ripen, give_up_for_frost])
@pytest.mark.parametrize("retry", [None, AGAIN])
async def test_a_task_that_ran_out_of_time_is_forgotten_at_once(
    function: Callable[[], Any], retry: Retry | None
) -> None:
    """Its error leads to the frames of the function, and those lead not back to the task."""
    async with Supervisor() as supervisor, nothing_collected():
        task = supervisor.task(timeout=0.001, retry=retry).schedule(function)
        await idle(supervisor)
        reference = weakref.ref(task)
        del task
        await until(lambda: reference() is None)


# Functions in threads


class Spade:
    """A sync function that is stuck in its thread until it is let go, once for each attempt."""

    def __init__(self, *results: Any) -> None:
        self.gate = threading.Event()
        self.results = list(results)
        self.calls = 0

    def __call__(self) -> Any:
        """Wait, and then return or raise what was given for this call; at once if that is set."""
        self.calls += 1
        result = self.results.pop(0) if self.results else "dug"
        if result != "at once":
            self.gate.wait()
        if isinstance(result, BaseException):
            raise result
        return result() if callable(result) else result


async def test_a_sync_function_that_takes_too_long_has_failed_while_its_thread_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At its time: its waiters go on, its record is written, its error handler runs."""
    spade, handled = Spade(), anyio.Event()

    async def note(task: Task, error: Exception) -> None:
        handled.set()

    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30, on_error=note).schedule(spade)
        with pytest.raises(TaskTimeoutError):
            await task.wait()
        assert anyio.current_time() == pytest.approx(30)
        assert task.status is TaskStatus.FAILED
        await handled.wait()
        await let_others_run()
        assert supervisor.running == (task,)
        spade.gate.set()
        await idle(supervisor)

    assert [record.levelname for record in ours(caplog)][:1] == ["ERROR"]
    assert (task.status, spade.calls) == (TaskStatus.FAILED, 1)


async def test_the_error_of_a_sync_function_that_takes_too_long_has_no_cause() -> None:
    """Where the thread is cannot be told, and where it was waited for tells nothing."""
    spade = Spade()
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30).schedule(spade)
        error = await over(task)
        spade.gate.set()

    assert isinstance(error, TaskTimeoutError)
    assert (error.__cause__, error.__context__) == (None, None)


@pytest.mark.parametrize("limited", [True, False])
async def test_a_stray_thread_keeps_its_place_until_it_ends(limited: bool) -> None:
    """Or there would be more of them than may be; then the next one gets it."""
    spade = Spade()
    async with Supervisor(threads=1) as supervisor:
        tasks = supervisor.task(limiter=anyio.CapacityLimiter(1) if limited else None)
        first = tasks.task(timeout=30).schedule(spade)
        await over(first)
        second = tasks.schedule(plough)
        await anyio.sleep(100)
        assert second.status is TaskStatus.PENDING
        spade.gate.set()
        await second.wait()
        assert second.status is TaskStatus.SUCCEEDED


async def test_a_drain_waits_for_a_stray_thread_and_names_its_task(observed: Observed) -> None:
    """The task has failed long ago, and is reported as finished when the thread ends."""
    spade = Spade()

    def let_go(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.DRAIN_WAITING:
            waited_for.append(event.tasks)
            spade.gate.set()

    waited_for: list[tuple[Task, ...]] = []
    supervisor = Supervisor(config=TaskConfig(shield=True), observers=[let_go])
    await supervisor.start()
    task = supervisor.task(timeout=5).schedule(spade)
    await over(task)

    report = await supervisor.drain()

    assert waited_for[0] == (task,)
    assert (report.finished, report.abandoned) == ((task,), ())


@pytest.mark.parametrize(("shield", "end"), [(True, 20), (False, 5)])
async def test_a_stray_thread_that_outlives_the_drain_is_reported_as_abandoned(
    shield: bool, end: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The report says so, and the drain ends in time; no record claims to cancel a thread."""
    spade = Spade()
    supervisor = Supervisor(config=TaskConfig(shield=shield), shutdown_timeout=20)
    await supervisor.start()
    task = supervisor.task(timeout=1).schedule(spade)
    await over(task)

    report = await supervisor.drain()
    spade.gate.set()

    assert (report.abandoned, report.finished, report.cancelled) == ((task,), (), ())
    assert report.duration == pytest.approx(end)
    told = [record.getMessage() for record in ours(caplog)]
    thread = f"the thread of {task.name} ({task.id})"
    assert f"Shutdown: abandoning {thread}, which did not end in time" in told
    assert not any("cancelling" in each for each in told)
    assert not task.cancel()


async def test_a_thread_that_has_strayed_and_ended_is_not_waited_for(observed: Observed) -> None:
    """A drain that begins as the last attempt ends, does not say that it cancels its task."""
    spade = Spade("too late", "at once")
    supervisor = Supervisor(observers=[observed], threads=1)
    await supervisor.start()
    task = supervisor.task(timeout=30, retry=AGAIN).schedule(spade)
    await until(lambda: spade.calls == 1)
    await anyio.sleep(100)
    spade.gate.set()
    await until(lambda: task.status is not TaskStatus.RUNNING)

    assert supervisor.running == ()
    report = await supervisor.drain()

    assert (report.finished, task.attempt) == ((), 2)
    assert "drain_cancelling" not in observed.kinds(task)


async def test_a_sync_function_that_runs_out_of_time_in_the_drain_is_a_failure() -> None:
    """With its thread it is waited for, and the attempt is the last one."""
    spade = Spade()
    supervisor = Supervisor(shutdown_timeout=20)
    await supervisor.start()
    task = supervisor.task(timeout=3, retry=AGAIN).schedule(spade)
    await task.started.wait()

    report = await supervisor.drain()
    spade.gate.set()

    assert (task.status, task.attempt) == (TaskStatus.FAILED, 1)
    assert report.abandoned == (task,)


async def test_a_late_result_is_dropped() -> None:
    """The task has failed, and stays so; a coroutine is closed, so that nobody is warned of it."""
    coroutines: list[Any] = []

    def make() -> Awaitable[None]:
        coroutines.append(plant())
        return coroutines[0]

    spade = Spade(make)
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30).schedule(spade)
        error = await over(task)
        spade.gate.set()
        await idle(supervisor)

    assert task.exception() is error
    assert inspect.getcoroutinestate(coroutines[0]) == inspect.CORO_CLOSED


async def test_a_late_error_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """The task has failed already, and has one record."""
    spade = Spade(FrostError())
    error = weakref.ref(spade.results[0])
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30).schedule(spade)
        await over(task)
        spade.gate.set()
        await idle(supervisor)
    gc.collect()

    assert [type(record.exc_info[1]) for record in ours(caplog) if record.exc_info] == [
        TaskTimeoutError
    ]
    assert error() is None


async def test_the_next_attempt_takes_a_place_of_its_own() -> None:
    """So two threads may run for one task."""
    spade = Spade()
    limiter = anyio.CapacityLimiter(2)
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30, retry=AGAIN, limiter=limiter).schedule(spade)
        await over(task)
        assert limiter.borrowed_tokens == 2
        assert anyio.current_time() == pytest.approx(60)
        spade.gate.set()
        await idle(supervisor)
        assert (limiter.borrowed_tokens, spade.calls) == (0, 2)


async def test_the_next_attempt_waits_for_a_place_that_a_stray_has() -> None:
    """Even for that of the attempt before."""
    spade = Spade("dug", "at once")

    async def let_go() -> None:
        await anyio.sleep(100)
        attempts.append(task.attempt)
        spade.gate.set()

    attempts: list[int] = []
    async with Supervisor(threads=1) as supervisor:
        task = supervisor.task(timeout=30, retry=AGAIN).schedule(spade)
        supervisor.schedule(let_go)
        await over(task)
        await idle(supervisor)

    assert (attempts, spade.calls) == ([1], 2)


async def test_a_task_that_succeeds_in_the_end_has_succeeded_whatever_strays() -> None:
    """It is over, but live until the thread is done; its late result changes nothing."""
    spade = Spade("too late", "at once")
    async with Supervisor() as supervisor:
        retry = Retry(on=TimeoutError, wait_initial=10, wait_max=10, wait_jitter=0)
        task = supervisor.task(timeout=30, retry=retry).schedule(spade)
        await until(lambda: spade.calls == 1)
        await anyio.sleep(35)
        await anyio.sleep(5)
        await until(lambda: task.status is not TaskStatus.RUNNING)
        assert (task.status, task.attempt) == (TaskStatus.SUCCEEDED, 2)
        await let_others_run()
        assert supervisor.running == (task,)
        spade.gate.set()
        await idle(supervisor)
        assert task.result() == "at once"


async def test_a_cancellation_in_the_backoff_does_not_wait_for_a_stray() -> None:
    """The task is cancelled at once, and live until the thread is done."""
    spade = Spade()
    retry = Retry(on=TimeoutError, wait_initial=3600, wait_max=3600, wait_jitter=0)
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30, retry=retry).schedule(spade)
        await anyio.sleep(100)
        task.cancel()
        await task.wait()
        moment = anyio.current_time()
        await let_others_run()
        assert supervisor.running == (task,)
        spade.gate.set()
        await idle(supervisor)

    assert (task.status, task.attempt, spade.calls) == (TaskStatus.CANCELLED, 1, 1)
    assert moment == pytest.approx(100)


async def test_a_stray_is_waited_for_when_a_cancelled_attempt_has_failed_and_was_handled() -> None:
    """The task goes on after its cancellation for the error handler, and once more for that."""
    gate, begun, handled = threading.Event(), anyio.Event(), list[Exception]()
    attempts: list[int] = []

    async def freeze() -> None:
        begun.set()
        try:
            await ripen()
        finally:
            raise FrostError

    def dig() -> Awaitable[None] | None:
        attempts.append(current_task().attempt)
        return gate.wait() and None if attempts == [1] else freeze()

    async def note(task: Task, error: Exception) -> None:
        await let_others_run()
        handled.append(error)

    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30, retry=AGAIN, on_error=note).schedule(dig)
        await until(lambda: attempts == [1])
        await anyio.sleep(31)
        await until(begun.is_set)
        task.cancel()
        await over(task)
        await until(lambda: bool(handled))
        await let_others_run()
        assert supervisor.running == (task,)
        gate.set()
        await idle(supervisor)

    assert [type(error) for error in handled] == [FrostError]


async def test_a_cancellation_in_the_queue_does_not_wait_for_a_stray() -> None:
    """Nor does one of the second attempt that has not got its place yet; it gives none away."""
    spade = Spade()
    limiter = anyio.CapacityLimiter(1)
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30, retry=AGAIN, limiter=limiter).schedule(spade)
        await anyio.sleep(100)
        task.cancel()
        await task.wait()
        assert (task.status, limiter.borrowed_tokens) == (TaskStatus.CANCELLED, 1)
        spade.gate.set()
        await idle(supervisor)
        assert (limiter.borrowed_tokens, spade.calls) == (0, 1)


async def test_a_task_that_was_cancelled_in_its_thread_has_no_other_attempt() -> None:
    """It is what it became, for who asked it to end: failed, when its time is up."""
    spade = Spade()
    async with Supervisor() as supervisor:
        task = supervisor.task(timeout=30, retry=AGAIN).schedule(spade)
        await task.started.wait()
        task.cancel()
        assert isinstance(await over(task), TaskTimeoutError)
        spade.gate.set()

    assert (task.status, task.attempt) == (TaskStatus.FAILED, 1)


async def test_what_a_sync_function_returns_to_be_awaited_has_the_same_time() -> None:
    """The attempt is over when that is."""

    begun = anyio.Event()

    async def grow() -> None:
        begun.set()
        await ripen()

    def prepare() -> Awaitable[None]:
        return grow()

    async with Supervisor() as supervisor:
        began = anyio.current_time()
        task = supervisor.task(timeout=30).schedule(prepare)
        await until(begun.is_set)
        error = await over(task)
        assert anyio.current_time() == pytest.approx(began + 30)

    assert isinstance(error, TaskTimeoutError)


weather: ContextVar[str] = ContextVar("weather")


@on_real_clocks
async def test_a_thread_with_a_timeout_knows_its_task_and_its_context() -> None:
    """As it does without one."""

    def look() -> tuple[str, Task]:
        return weather.get(), current_task()

    async with Supervisor() as supervisor:
        token = weather.set("rain")
        task = supervisor.task(timeout=3600).schedule(look)
        weather.reset(token)
        assert await task.wait() == ("rain", task)


@on_real_clocks
async def test_a_sync_function_that_is_quick_enough_notices_nothing() -> None:
    """Its result and its errors are the task's."""
    async with Supervisor(config=TaskConfig(timeout=3600)) as supervisor:
        assert await supervisor.schedule(Spade("at once")).wait() == "at once"
        failed = supervisor.schedule(freeze_in_thread)
        with pytest.raises(FrostError):
            await failed.wait()
        await idle(supervisor)


@on_real_clocks
@pytest.mark.parametrize("limit", [None, 3600])
async def test_a_thread_that_cannot_be_started_is_a_failed_attempt(
    limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place goes to the next one."""
    run_sync = anyio.to_thread.run_sync

    async def fail_once(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(anyio.to_thread, "run_sync", run_sync)
        raise RuntimeError("can't start new thread")

    limiter = anyio.CapacityLimiter(1)
    retry = Retry(on=RuntimeError, attempts=2, wait_initial=0, wait_jitter=0)
    async with Supervisor() as supervisor:
        monkeypatch.setattr(anyio.to_thread, "run_sync", fail_once)
        config = TaskConfig(timeout=limit, retry=retry, limiter=limiter)
        task = supervisor.task(config).schedule(Spade("at once"))
        assert await task.wait() == "at once"

    assert (task.attempt, limiter.borrowed_tokens) == (2, 0)


@on_asyncio
@pytest.mark.parametrize("when", ["at once", "in the thread", "when time is up"])
async def test_who_cancels_all_of_the_loops_tasks_loses_no_place(when: str) -> None:
    """A server that is in a hurry does, and so does asyncio.run at its end."""
    spade = Spade()
    limiter = anyio.CapacityLimiter(1)
    supervisor = Supervisor()
    await supervisor.start()
    before = asyncio.all_tasks()
    limit = 0.001 if when == "when time is up" else 3600
    task = supervisor.task(timeout=limit, limiter=limiter).schedule(spade)
    if when != "at once":
        await task.started.wait()
        await let_others_run()
    if when == "when time is up":
        await over(task)

    others = asyncio.all_tasks() - before
    for other in others:
        other.cancel()
    await asyncio.wait(others)
    spade.gate.set()

    expected = TaskStatus.FAILED if when == "when time is up" else TaskStatus.CANCELLED
    assert (task.status, limiter.borrowed_tokens) == (expected, 0)
    await supervisor.drain()


@on_asyncio
async def test_a_thread_that_somebody_keeps_from_being_started_is_a_cancelled_task() -> None:
    """Nothing has come of it, which is not the same as that None has."""
    async with Supervisor() as supervisor:
        before = asyncio.all_tasks()
        task = supervisor.task(timeout=3600).schedule(plough)
        await task.started.wait()
        (thread,) = asyncio.all_tasks() - before - {task.handle}
        thread.cancel()
        await task.wait()

    assert task.status is TaskStatus.CANCELLED


@on_asyncio
async def test_a_result_that_comes_as_its_task_is_cancelled_is_dropped() -> None:
    """A coroutine is closed then, too; the loop has the cancellation and the result at once."""
    coroutines: list[Any] = []
    gate = threading.Event()

    def make() -> Awaitable[None]:
        gate.wait()
        coroutines.append(plant())
        return coroutines[0]

    async with Supervisor() as supervisor:
        before = asyncio.all_tasks()
        task = supervisor.task(timeout=3600).schedule(make)
        await task.started.wait()
        (thread,) = asyncio.all_tasks() - before - {task.handle}
        thread.add_done_callback(lambda _: task.handle.cancel())
        gate.set()
        await task.wait()

    assert task.status is TaskStatus.CANCELLED
    assert inspect.getcoroutinestate(coroutines[0]) == inspect.CORO_CLOSED


def test_the_end_of_asyncio_does_not_wait_for_an_abandoned_stray(
    request: pytest.FixtureRequest,
) -> None:
    """The process does, since it ends after its threads."""
    spade = Spade()
    request.addfinalizer(spade.gate.set)

    async def main() -> tuple[Task, ...]:
        supervisor = Supervisor(shutdown_timeout=0.02)
        await supervisor.start()
        task = supervisor.task(timeout=0.001).schedule(spade)
        await over(task)
        return (await supervisor.drain()).abandoned

    def run() -> list[TaskStatus]:
        return [task.status for task in asyncio.run(main())]

    # Coverage.py follows no line of this function after an event loop that has left something.
    assert run() == [TaskStatus.FAILED]


async def until_second_attempt(task: Task) -> None:
    """Wait until the first attempt has run out of time."""
    await until(lambda: task.attempt == 2)


@on_real_clocks
@pytest.mark.parametrize("last", ["at once", FrostError, "dug"])
async def test_a_task_whose_thread_strayed_is_forgotten_when_that_ends(last: Any) -> None:
    """Whatever came of its last attempt."""
    spade = Spade("dug", last if isinstance(last, str) else last())
    async with Supervisor() as supervisor, nothing_collected():
        task = supervisor.task(timeout=0.02, retry=AGAIN).schedule(spade)
        await until_second_attempt(task)
        spade.gate.set()
        await idle(supervisor)
        reference = weakref.ref(task)
        del task
        await until(lambda: reference() is None)

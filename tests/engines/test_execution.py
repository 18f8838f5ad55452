"""How one attempt of a job runs in a worker, and what comes of it."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from fastapi_tasks import (
    JobFailedError,
    Progress,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskEventKind,
    TaskStatus,
    WorkerLostError,
    current_task,
)
from fastapi_tasks.engines.execution import (
    Again,
    Cancelled,
    Executor,
    Failed,
    Interrupted,
    Outcome,
    Succeeded,
)
from tests.recording import Observed, let_others_run, ours, until
from tests.servers import PATIENCE

from .clocks import on_fake_clock
from .functions import fresh
from .memory import MemoryEngine
from .test_messages import a_message


class JammedError(Exception):
    """What goes wrong in this module."""


class Line:
    """An engine whose jobs are run by hand, as its worker would."""

    def __init__(self, **settings: Any) -> None:
        self.engine = MemoryEngine(worker=True)
        self.observed = Observed()
        self.supervisor = Supervisor(engines=[self.engine], observers=[self.observed], **settings)
        self.stored: list[float] = []

    @property
    def executor(self) -> Executor:
        """What runs the jobs."""
        assert self.engine.executor is not None
        return self.engine.executor

    def job(self, func: Callable[..., Any], **policy: Any) -> None:
        """Register the function of all jobs."""
        self.engine.task(name="press", **policy)(fresh(func))

    async def run(
        self, *, attempt: int = 1, store: Any = None, lost: int = 0, **message: Any
    ) -> Outcome:
        """Run one attempt of the job."""
        text = a_message(**({"name": "press", "arguments": {}} | message)).model_dump_json()
        with anyio.fail_after(PATIENCE):
            return await self.executor.run(
                "5c1f", text, attempt=attempt, store_progress=store, lost=lost
            )

    def begin(self, **options: Any) -> asyncio.Task[Outcome]:
        """Begin to run one, beside the caller."""
        return asyncio.create_task(self.run(**options))

    async def started(self) -> None:
        """Wait until the job runs."""
        await until(lambda: TaskEventKind.STARTED in self.observed.kinds())

    @property
    def kinds(self) -> list[str]:
        """What happened to the job, and not to the supervisor."""
        return [kind for kind in self.observed.kinds() if not kind.startswith("drain")]


@pytest.fixture
def line() -> Line:
    """An engine whose jobs are run by hand."""
    return Line()


async def jam() -> None:
    """Fail."""
    raise JammedError("paper")


def jam_in_thread() -> None:
    """Fail in a thread."""
    raise JammedError("paper")


async def hold() -> None:
    """Run until somebody cancels it."""
    await anyio.sleep(math.inf)


# Well or with an error


async def test_an_attempt_is_a_task_of_the_supervisor(line: Line) -> None:
    """With the job's id and attempt, and with everything that watches tasks."""
    seen: list[Task] = []

    async def press(sheets: int) -> int:
        seen.append(current_task())
        assert line.executor.running == ("5c1f",)
        return sheets * 2

    line.job(press)
    async with line.supervisor:
        assert await line.run(arguments={"sheets": 4}, attempt=3) == Succeeded("8")
        assert line.executor.running == ()

    assert [(t.id, t.name, t.attempt, t.status) for t in seen] == [
        ("5c1f", "press", 3, TaskStatus.SUCCEEDED)
    ]
    assert line.kinds == ["scheduled", "started", "finished"]


async def test_a_job_s_context_is_its_own(line: Line) -> None:
    """Neither the worker's nor that of another job is to be seen in it."""
    line.job(lambda: None)
    async with line.supervisor:
        task = line.begin()
        await line.started()
        (job,) = {event.task for event in line.observed.events}
        assert await task == Succeeded("null")
    assert job.context is None


# AnyIO's older runners of tests have an argument "func" themselves.
@pytest.mark.parametrize("jamming", [jam, jam_in_thread])
async def test_a_failure_without_a_retry_is_final(
    line: Line, caplog: pytest.LogCaptureFixture, jamming: Callable[..., Any]
) -> None:
    """It is logged here, with its traceback; what asks for the job hears of it by its text."""
    line.job(jamming)
    async with line.supervisor:
        assert await line.run(attempt=2) == Failed("JammedError", "paper")

    (record,) = (r for r in ours(caplog) if r.levelname == "ERROR")
    assert record.message == "Task press (5c1f) failed in attempt 2"
    assert record.exc_info
    assert line.kinds == ["scheduled", "started", "failed"]


async def test_a_failure_that_is_retried_is_the_engine_s_to_wait_for(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps no place in the worker meanwhile; the last one is final."""
    line.job(jam, retry=Retry(on=JammedError, attempts=2, wait_initial=7, wait_max=7))
    async with line.supervisor:
        assert await line.run() == Again(7, "JammedError", "paper")
        assert await line.run(attempt=2) == Failed("JammedError", "paper")

    assert line.kinds == ["scheduled", "started", "retrying", "scheduled", "started", "failed"]
    assert "failed in attempt 1, the next one follows in 7 s" in caplog.text


async def test_a_message_s_retry_and_timeout_take_the_place_of_the_function_s(line: Line) -> None:
    """As they were given with ``using``."""
    line.job(hold, timeout=30)
    retry = {
        "on": ["fastapi_tasks:TaskTimeoutError"],
        "attempts": 2,
        "wait_initial": 1,
        "wait_max": 1,
        "wait_jitter": 0,
        "wait_exp_base": 1,
        "timeout": None,
    }
    async with line.supervisor:
        outcome = await line.run(retry=retry, timeout=0.001)
    assert isinstance(outcome, Again)
    assert (outcome.wait, outcome.error_type) == (1, "TaskTimeoutError")


@on_fake_clock
@pytest.mark.parametrize(("asked", "seconds"), [(None, 30), (2, 2)])
async def test_an_attempt_has_a_limit_of_time(
    line: Line, asked: float | None, seconds: float
) -> None:
    """A timeout is a failure, and no cancellation."""
    line.job(hold, timeout=30)
    async with line.supervisor:
        begun = anyio.current_time()
        outcome = await line.executor.run(
            "5c1f",
            a_message(name="press", arguments={}, timeout=asked).model_dump_json(),
            attempt=1,
            store_progress=None,
        )
        assert anyio.current_time() - begun == pytest.approx(seconds)
    assert isinstance(outcome, Failed)
    assert outcome.error_type == "TaskTimeoutError"


async def test_a_limit_can_be_taken_away(line: Line) -> None:
    """By 0 in the message."""

    async def press() -> bool:
        return current_task().config.time_limit == math.inf

    line.job(press, timeout=0.001)
    async with line.supervisor:
        assert await line.run(timeout=0) == Succeeded("true")


async def test_a_retry_s_function_that_fails_ends_the_job(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """As a task's does; it is logged."""

    def decide(error: Exception) -> bool:
        raise LookupError("undecided")

    line.job(jam, retry=Retry(on=decide))
    async with line.supervisor:
        assert await line.run() == Failed("JammedError", "paper")
    assert "Task press (5c1f) is not retried" in caplog.text


async def test_system_exit_is_a_failed_job(line: Line) -> None:
    """And not a dead worker; nothing is worth another attempt, nor handled."""
    handled: list[Exception] = []

    async def leave() -> None:
        raise SystemExit(3)

    line.job(
        leave,
        retry=Retry(on=Exception),
        on_error=lambda task, error: handled.append(error),
    )
    async with line.supervisor:
        assert await line.run() == Failed("SystemExit", "3")
        assert line.supervisor.is_running
    assert handled == []


async def test_a_result_that_cannot_be_kept_is_a_failure(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for it hears of it, and so does the log."""

    async def press() -> int:
        return "hunter2"  # type: ignore[return-value]

    line.job(press)
    async with line.supervisor:
        outcome = await line.run()
    assert isinstance(outcome, Failed)
    assert outcome.error_type == "InvalidArgumentsError"
    assert "Job 5c1f has a result that cannot be kept" in caplog.text
    assert "hunter2" not in caplog.text


# What is no job


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hunter2", "MalformedMessageError"),
        (a_message(name="unknown").model_dump_json(), "UnregisteredFunctionError"),
        (a_message(name="press").model_dump_json(), "InvalidArgumentsError"),
    ],
)
async def test_what_cannot_be_run_is_refused(
    line: Line, caplog: pytest.LogCaptureFixture, text: str, kind: str
) -> None:
    """It is to be kept, for somebody to look at; the worker lives on."""
    line.job(hold)
    async with line.supervisor:
        outcome = await line.executor.run("5c1f", text, attempt=1, store_progress=None)
        assert line.supervisor.is_running

    assert isinstance(outcome, Failed)
    assert (outcome.error_type, outcome.refused) == (kind, True)
    assert "Job 5c1f was refused" in caplog.text
    assert "hunter2" not in caplog.text
    assert line.kinds == []


# Error handlers


async def handle_async(task: Task, error: Exception) -> None:
    """Be told in the loop."""
    await let_others_run()
    HANDLED.append((task.id, task.status, str(error), False))


def handle_sync(task: Task, error: Exception) -> None:
    """Be told in a thread."""
    is_other = threading.current_thread() is not threading.main_thread()
    HANDLED.append((task.id, task.status, str(error), is_other))


HANDLED: list[tuple[str, TaskStatus, str, bool]] = []


@pytest.fixture(autouse=True)
def nothing_handled() -> None:
    """Each test begins anew."""
    HANDLED.clear()


@pytest.mark.parametrize("handler", [handle_async, handle_sync])
@pytest.mark.parametrize("is_app_wide", [True, False])
async def test_an_error_handler_is_done_before_the_engine_hears_of_the_failure(
    handler: Any, is_app_wide: bool
) -> None:
    """The function's own, or the one of the app; async or in a thread."""
    config = TaskConfig(on_error=handler) if is_app_wide else None
    line = Line(config=config)
    line.job(jam, on_error=None if is_app_wide else handler)
    async with line.supervisor:
        assert await line.run() == Failed("JammedError", "paper")
        (handled,) = HANDLED
        assert handled == ("5c1f", "failed", "paper", handler is handle_sync)


async def test_an_error_handler_is_for_the_last_attempt(line: Line) -> None:
    """Before it, nothing is lost."""
    line.job(jam, on_error=handle_async, retry=Retry(on=JammedError, attempts=2))
    async with line.supervisor:
        assert isinstance(await line.run(), Again)
        assert HANDLED == []
        await line.run(attempt=2)
        assert len(HANDLED) == 1


async def test_an_error_handler_may_fail(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """That is logged, and the job's failure is what it was."""

    def handle(task: Task, error: Exception) -> None:
        raise LookupError("no address")

    line.job(jam, on_error=handle)
    async with line.supervisor:
        assert await line.run() == Failed("JammedError", "paper")
    await let_others_run()
    assert line.kinds[-1] == "handler_failed"


async def test_an_error_handler_may_run_the_job_again(line: Line) -> None:
    """As a task's may; the job stays failed."""
    runs: list[int] = []

    async def press() -> int:
        runs.append(len(runs))
        if len(runs) == 1:
            raise JammedError("paper")
        return len(runs)

    async def handle(task: Task, error: Exception) -> None:
        assert await task() == 2

    line.job(press, on_error=handle)
    async with line.supervisor:
        assert await line.run() == Failed("JammedError", "paper")
    assert runs == [0, 1]
    assert "handler_failed" not in line.kinds


@pytest.mark.parametrize("jamming", [jam, jam_in_thread])
async def test_a_job_that_no_worker_survives_has_its_error_handled(
    line: Line, caplog: pytest.LogCaptureFixture, jamming: Callable[..., Any]
) -> None:
    """Its function is not run, but the handler may do so; there is no further attempt."""

    async def handle(task: Task, error: Exception) -> None:
        assert isinstance(error, WorkerLostError)
        with pytest.raises(JammedError):
            await task()
        HANDLED.append((task.id, task.status, str(error.deliveries), True))

    line.job(jamming, on_error=handle, retry=Retry(on=Exception))
    async with line.supervisor:
        outcome = await line.run(attempt=2, lost=3)
    assert outcome == Failed("WorkerLostError", str(WorkerLostError(3)))
    assert HANDLED == [("5c1f", "failed", "3", True)]
    assert line.kinds == ["scheduled", "started", "failed"]
    assert "Task press (5c1f) failed in attempt 2" in caplog.text


@pytest.mark.parametrize("lost", [0, 2])
async def test_a_job_that_has_failed_is_let_go(line: Line, lost: int) -> None:
    """By the reference count, so not with the next garbage collection only."""
    jobs: list[weakref.ref[Task]] = []

    async def handle(task: Task, error: Exception) -> None:
        jobs.append(weakref.ref(task))

    line.job(jam, on_error=handle)
    line.supervisor = Supervisor(engines=[line.engine])  # nobody keeps what is observed
    async with line.supervisor:
        gc.disable()
        try:
            await line.run(lost=lost)
            await let_others_run()
            assert [job() for job in jobs] == [None]
        finally:
            gc.enable()


async def test_a_job_that_no_worker_survives_may_have_no_error_handler(line: Line) -> None:
    """It has failed like any other."""
    line.job(hold)
    async with line.supervisor:
        assert await line.run(lost=1) == Failed("WorkerLostError", str(WorkerLostError(1)))


async def test_a_handler_that_is_cancelled_before_it_begins_holds_nothing_up(
    line: Line,
) -> None:
    """Between the failure and the handler there is a moment, in which a shutdown may come."""

    async def press() -> None:
        job = current_task()
        asyncio.get_running_loop().call_soon(job.handle.cancel)
        raise JammedError("paper")

    line.job(press, on_error=handle_async)
    async with line.supervisor:
        assert await line.run() == Failed("JammedError", "paper")
    assert HANDLED == []


# Progress


async def test_progress_is_stored_while_the_job_runs(line: Line) -> None:
    """Whoever asks for the job sees it, elsewhere."""
    stored: list[Progress] = []

    async def store(progress: Progress) -> None:
        stored.append(progress)

    async def press() -> None:
        for done in range(3):
            current_task().set_progress(done, 2, "pressing")
            await until(lambda done=done: len(stored) == done + 1)  # type: ignore[misc]

    line.job(press)
    async with line.supervisor:
        assert await line.run(store=store) == Succeeded("null")
    assert stored == [Progress(done=n, total=2, message="pressing") for n in range(3)]


async def test_progress_is_told_from_a_thread_too(line: Line) -> None:
    """The last one is stored before the job is over."""
    stored: list[float] = []

    async def store(progress: Progress) -> None:
        await let_others_run()
        stored.append(progress.done)

    def press() -> None:
        for done in range(100):
            current_task().set_progress(done)

    line.job(press)
    async with line.supervisor:
        await line.run(store=store)
    assert stored[-1] == 99
    assert stored == sorted(stored)


async def test_of_many_only_the_latest_is_stored(line: Line) -> None:
    """A job may tell of it a thousand times in a second, and an engine is slow."""
    stored: list[float] = []
    may_store = anyio.Event()

    async def store(progress: Progress) -> None:
        stored.append(progress.done)
        await may_store.wait()

    async def press() -> None:
        current_task().set_progress(0)
        await until(lambda: stored == [0])
        for done in range(1, 1000):
            current_task().set_progress(done)
            await anyio.lowlevel.checkpoint()
        may_store.set()

    line.job(press)
    async with line.supervisor:
        await line.run(store=store)
    assert stored == [0, 999]


async def test_progress_that_cannot_be_stored_is_no_failure(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, and the next one is tried."""
    stored: list[float] = []

    async def store(progress: Progress) -> None:
        if not progress.done:
            raise ConnectionError("no answer")
        stored.append(progress.done)

    async def press() -> None:
        current_task().set_progress(0)
        await let_others_run()
        current_task().set_progress(1)

    line.job(press)
    async with line.supervisor:
        assert await line.run(store=store) == Succeeded("null")
    assert stored == [1]
    assert "The progress of job 5c1f could not be stored" in caplog.text


async def test_progress_may_be_of_no_interest_to_an_engine(line: Line) -> None:
    """It is there in this process all the same."""
    seen: list[Progress | None] = []

    async def press() -> None:
        current_task().set_progress(1)
        found = line.supervisor.find("5c1f")
        assert found is not None
        seen.append(found.progress)

    line.job(press)
    async with line.supervisor:
        await line.run()
    assert seen == [Progress(done=1)]


async def test_progress_on_its_way_is_no_task_to_find(line: Line) -> None:
    """A thread asks for a task while the loop has not heard of its progress yet."""

    async def store(progress: Progress) -> None:
        """Be quick."""

    def press() -> None:
        async def block() -> None:
            told.set()
            assert asked.wait(PATIENCE)

        anyio.from_thread.run_sync(asyncio.ensure_future, block())
        assert told.wait(PATIENCE)
        current_task().set_progress(1)
        assert line.supervisor.find("unknown") is None
        asked.set()

    told, asked = threading.Event(), threading.Event()
    line.job(press)
    async with line.supervisor:
        assert await line.run(store=store) == Succeeded("null")


# Cut off, cancelled, timed out: three things


async def test_a_shutdown_interrupts_a_job(line: Line) -> None:
    """Which runs again elsewhere, with no attempt burned: neither a failure nor a cancellation."""
    line.job(hold, on_error=handle_async, retry=Retry(on=Exception))
    async with line.supervisor:
        running = line.begin()
        await line.started()
        executor = line.executor
    assert await running == Interrupted()
    assert executor.interrupted == 1
    assert HANDLED == []


@on_fake_clock
async def test_a_shielded_job_is_waited_for() -> None:
    """As a worker's are: until shortly before the deadline."""
    line = Line(shutdown_timeout=20)
    line.engine.shield = True

    async def press(seconds: int) -> str:
        await anyio.sleep(seconds)
        return "done"

    line.job(press)
    async with line.supervisor:
        short, long = (line.begin(arguments={"seconds": n}) for n in (14, 16))
        await let_others_run()
        executor = line.executor
        begun = anyio.current_time()
    assert await short == Succeeded('"done"')
    assert await long == Interrupted()
    assert anyio.current_time() - begun == pytest.approx(15)
    assert executor.interrupted == 1


async def test_a_job_may_end_well_though_it_was_told_to_end(line: Line) -> None:
    """Then it need not run again."""

    async def press() -> str:
        try:
            await hold()
        except asyncio.CancelledError:
            return "just in time"

    line.job(press)
    async with line.supervisor:
        running = line.begin()
        await line.started()
        executor = line.executor
    assert await running == Succeeded('"just in time"')
    assert executor.interrupted == 0


async def failing_when_cancelled() -> None:
    """Make another error of a cancellation, as many libraries do."""
    try:
        await hold()
    except asyncio.CancelledError:
        raise JammedError("interrupted") from None


@pytest.mark.parametrize("retry", [None, Retry(on=JammedError, attempts=9)])
async def test_whatever_a_job_makes_of_the_shutdown_it_was_interrupted(
    line: Line, retry: Retry | None
) -> None:
    """It failed because of that, so no attempt is burned, and nothing is to be handled."""
    line.job(failing_when_cancelled, on_error=handle_async, retry=retry)
    async with line.supervisor:
        running = line.begin()
        await line.started()
        executor = line.executor
    assert await running == Interrupted()
    assert executor.interrupted == 1
    assert HANDLED == []


async def test_a_failure_that_is_being_handled_at_the_shutdown_is_a_failure(line: Line) -> None:
    """It came before."""
    begun = anyio.Event()

    async def handle(task: Task, error: Exception) -> None:
        begun.set()
        await hold()

    line.job(jam, on_error=handle)
    async with line.supervisor:
        running = line.begin()
        await begun.wait()
    assert await running == Failed("JammedError", "paper")


async def test_what_a_worker_takes_too_late_does_not_begin(line: Line) -> None:
    """It is handed back, and was not cut off."""
    line.job(hold)
    async with line.supervisor:
        executor = line.executor
    text = a_message(name="press", arguments={}).model_dump_json()
    assert await executor.run("5c1f", text, attempt=2, store_progress=None) == Interrupted()
    assert executor.interrupted == 0
    assert "started" not in line.kinds


def by_executor(line: Line) -> bool:
    """Cancel the job as its engine does."""
    return line.executor.cancel("5c1f")


def by_supervisor(line: Line) -> bool:
    """Cancel the job as any task of the process."""
    return line.supervisor.cancel("5c1f")


@pytest.mark.parametrize("cancel", [by_executor, by_supervisor])
async def test_a_job_that_somebody_cancels_is_cancelled(
    line: Line, cancel: Callable[[Line], bool]
) -> None:
    """It does not run again."""
    line.job(hold, on_error=handle_async, retry=Retry(on=Exception))
    async with line.supervisor:
        assert cancel(line) is False
        running = line.begin()
        await line.started()
        assert cancel(line) is True
        assert await running == Cancelled()
        assert cancel(line) is False
        assert line.executor.interrupted == 0
    assert HANDLED == []


async def test_a_cancelled_job_that_fails_instead_is_not_retried(line: Line) -> None:
    """Nobody wants it any more; what it raised is told."""
    line.job(failing_when_cancelled, on_error=handle_async, retry=Retry(on=JammedError))
    async with line.supervisor:
        running = line.begin()
        await line.started()
        line.executor.cancel("5c1f")
        assert await running == Failed("JammedError", "interrupted")
    assert len(HANDLED) == 1


async def test_a_job_that_cancels_itself_is_cancelled(line: Line) -> None:
    """Else it would run again, and again."""

    async def press() -> None:
        raise asyncio.CancelledError

    line.job(press)
    async with line.supervisor:
        assert await line.run() == Cancelled()
        assert line.executor.interrupted == 0


async def test_a_runner_that_is_cancelled_takes_its_job_along(line: Line) -> None:
    """An engine that has lost a job must not run it, and waits until it has ended."""
    happened: list[str] = []

    async def press() -> None:
        try:
            await hold()
        finally:
            await asyncio.sleep(0)
            happened.append("cleaned up")

    line.job(press)
    async with line.supervisor:
        running = line.begin()
        await line.started()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert happened == ["cleaned up"]
        assert line.executor.running == ()


async def test_a_runner_that_is_cancelled_twice_waits_no_longer(line: Line) -> None:
    """For a thread, for one, which nobody can cancel."""
    release = threading.Event()

    line.job(lambda: release.wait(PATIENCE) and None)
    async with line.supervisor:
        running = line.begin()
        await line.started()
        for _ in range(2):
            running.cancel()
            await let_others_run()
        with pytest.raises(asyncio.CancelledError):
            await running
        release.set()


async def test_a_job_that_was_handed_out_twice_is_forgotten_once(line: Line) -> None:
    """An engine that takes it for lost gives it out again, to this very process."""
    releases = [anyio.Event(), anyio.Event()]
    waiting = iter(releases)

    async def press() -> None:
        await next(waiting).wait()

    line.job(press)
    async with line.supervisor:
        first = line.begin()
        await let_others_run()
        second = line.begin()
        await let_others_run()
        releases[0].set()
        assert await first == Succeeded("null")
        assert line.executor.running == ("5c1f",)
        releases[1].set()
        assert await second == Succeeded("null")
        assert line.executor.running == ()


async def test_a_job_that_outlives_the_shutdown_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It runs again elsewhere: the engine is stopped, though its thread goes on."""
    line = Line(shutdown_timeout=0.02)
    line.engine.shield = True
    release = threading.Event()

    line.job(lambda: release.wait(PATIENCE) and None)
    async with line.supervisor:
        text = a_message(name="press", arguments={}).model_dump_json()
        running = asyncio.create_task(
            line.executor.run("5c1f", text, attempt=1, store_progress=None)
        )
        await line.started()
        executor = line.executor
    assert await running == Interrupted()
    assert executor.interrupted == 1
    assert not line.engine.is_started
    assert "abandoning press (5c1f)" in caplog.text
    release.set()


async def test_so_is_one_whose_handler_does() -> None:
    """But it has failed, and that is what is kept."""
    line = Line(shutdown_timeout=0.02)
    begun, release = threading.Event(), threading.Event()

    def handle(task: Task, error: Exception) -> None:
        begun.set()
        assert release.wait(PATIENCE)

    line.job(jam, on_error=handle)
    async with line.supervisor:
        running = line.begin()
        await until(begun.is_set)
    assert await running == Failed("JammedError", "paper")
    release.set()


# Through an engine


@on_fake_clock
async def test_an_engine_makes_the_attempts(jobs: MemoryEngine) -> None:
    """Each waits for its time, and knows which one it is."""
    attempts: list[tuple[int, float]] = []

    @jobs.task(retry=Retry(on=JammedError, attempts=3, wait_jitter=0, wait_initial=10, wait_max=60))
    async def press() -> str:
        attempts.append((current_task().attempt, anyio.current_time()))
        if len(attempts) < 3:
            raise JammedError("paper")
        return "pressed"

    async with Supervisor(engines=[jobs]):
        begun = anyio.current_time()
        job = await jobs.enqueue(press)
        assert await job.wait() == "pressed"
        assert (await job.info()).attempt == 3
    assert [(n, round(at - begun)) for n, at in attempts] == [(1, 0), (2, 10), (3, 30)]


async def test_progress_is_seen_by_those_who_ask_for_the_job(jobs: MemoryEngine) -> None:
    """While it runs, wherever that is."""
    seen = anyio.Event()

    @jobs.task
    async def press() -> None:
        current_task().set_progress(1, 2)
        await seen.wait()

    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(press)
        await until(lambda: jobs.rows[job.id].info.progress is not None)
        info = await job.info()
        seen.set()
        await job.wait()
    assert info.progress == Progress(done=1, total=2)


async def test_a_cancelled_job_ends_in_its_worker(jobs: MemoryEngine) -> None:
    """And is cancelled for those who ask for it."""
    begun = anyio.Event()

    @jobs.task
    async def press() -> None:
        begun.set()
        await hold()

    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(press)
        await begun.wait()
        assert await job.cancel() is True
        await jobs.rows[job.id].over.wait()
        assert (await job.info()).status is TaskStatus.CANCELLED


async def test_an_interrupted_job_runs_again(jobs: MemoryEngine) -> None:
    """After the restart, with the same attempt."""
    attempts: list[int] = []
    waiting: list[Callable[[], Awaitable[None]]] = [hold, let_others_run]

    @jobs.task
    async def press() -> str:
        attempts.append(current_task().attempt)
        await waiting[len(attempts) - 1]()
        return "pressed"

    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(press)
        await until(lambda: attempts == [1])
    async with Supervisor(engines=[jobs]):
        assert await job.wait() == "pressed"
    assert attempts == [1, 1]


async def test_a_failed_job_is_failed_for_those_who_wait(jobs: MemoryEngine) -> None:
    """Also if its handler takes its time."""
    job_handled = anyio.Event()

    async def handle(task: Task, error: Exception) -> None:
        await let_others_run()
        job_handled.set()

    func = jobs.task(name="jam", on_error=handle)(fresh(jam_in_thread))
    async with Supervisor(engines=[jobs]):
        job = await jobs.enqueue(func)
        with pytest.raises(JobFailedError):
            await job.wait()
        assert job_handled.is_set()

"""Where tasks run: a supervisor's life, and whoever schedules on it from wherever."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, cast

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import sniffio
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.types import Scope

from fastapi_tasks import (
    BoundTasks,
    DrainReport,
    FastAPITasksUninitializedAppError,
    NoCurrentTaskError,
    Supervisor,
    SupervisorStateError,
    Task,
    TaskConfig,
    TaskEventKind,
    Tasks,
    TasksScheduler,
    TaskStatus,
    UninitializedReason,
    add_tasks,
    current_task,
    get_supervisor,
)
from fastapi_tasks import supervisor as supervisor_module
from fastapi_tasks.connection import Connection
from fastapi_tasks.inbox import Inbox
from fastapi_tasks.spawn import Spawner

from . import asgi
from .clocks import Backend
from .conftest import ASYNCIO_BACKENDS, BACKENDS
from .recording import Observed, collect_within_a_task, idle


async def fetch(book: str = "atlas") -> str:
    """Succeed."""
    await anyio.lowlevel.checkpoint()
    return book


async def read() -> None:
    """Run until somebody cancels it."""
    await anyio.Event().wait()


def run_on(backend: Backend, main: Callable[[], Any]) -> Any:
    """Run a coroutine function in an event loop of its own."""
    return anyio.run(main, backend=backend[0], backend_options=backend[1])


def in_plain_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a thread that no event loop knows of."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


# From start to drain


async def test_a_supervisor_runs_from_start_to_drain() -> None:
    """Tasks that are scheduled in between run, others do not."""
    supervisor = Supervisor()
    before = supervisor.schedule(fetch)
    await supervisor.start()
    between = supervisor.schedule(fetch)
    await between.wait()
    await supervisor.drain()
    after = supervisor.schedule(fetch)

    assert [task.status for task in (before, between, after)] == [
        TaskStatus.CANCELLED,
        TaskStatus.SUCCEEDED,
        TaskStatus.CANCELLED,
    ]


async def test_a_supervisor_is_a_context_manager() -> None:
    """For scripts and tests: started on entry, drained on exit."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(read)
        await task.started.wait()

    assert task.status is TaskStatus.CANCELLED


async def test_the_context_manager_drains_after_an_error_too() -> None:
    """The error is the caller's, and no task is left behind."""
    tasks: list[Task] = []

    async def main() -> None:
        async with Supervisor() as supervisor:
            tasks.append(supervisor.schedule(read))
            await tasks[0].started.wait()
            raise LookupError

    with pytest.raises(LookupError):
        await main()

    assert tasks[0].status is TaskStatus.CANCELLED


async def test_a_supervisor_cannot_be_started_twice() -> None:
    """The error says how it is used; the supervisor goes on."""
    async with Supervisor() as supervisor:
        with pytest.raises(SupervisorStateError, match=r"start\(\).* while .* running") as caught:
            await supervisor.start()

        assert "async with Supervisor() as supervisor" in str(caught.value)
        assert await supervisor.schedule(fetch).wait() == "atlas"


async def test_a_supervisor_that_was_not_started_cannot_be_drained() -> None:
    """Nor one that was drained before."""
    supervisor = Supervisor()
    with pytest.raises(SupervisorStateError, match=r"drain\(\).* not running"):
        await supervisor.drain()
    await supervisor.start()
    await supervisor.drain()
    with pytest.raises(SupervisorStateError, match=r"drain\(\).* not running"):
        await supervisor.drain()


async def test_a_drain_cannot_be_interfered_with() -> None:
    """Neither a second drain nor a start while it goes on; it ends well all the same."""
    gate = anyio.Event()
    supervisor = Supervisor(config=TaskConfig(shield=True))
    await supervisor.start()
    task = supervisor.schedule(gate.wait)
    reports: list[DrainReport] = []

    async def drain() -> None:
        reports.append(await supervisor.drain())

    async with anyio.create_task_group() as group:
        group.start_soon(drain)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(SupervisorStateError):
            await supervisor.drain()
        with pytest.raises(SupervisorStateError):
            await supervisor.start()
        gate.set()

    assert [report.finished for report in reports] == [(task,)]


async def test_whether_it_runs_can_be_asked() -> None:
    """Requests ask before they let anybody schedule; the error tells what is missing."""
    supervisor = Supervisor()
    with pytest.raises(FastAPITasksUninitializedAppError) as early:
        supervisor.require_running()
    async with supervisor:
        supervisor.require_running()
        assert supervisor.is_running
    with pytest.raises(FastAPITasksUninitializedAppError) as late:
        supervisor.require_running()

    assert not supervisor.is_running
    assert early.value.reason is UninitializedReason.NOT_STARTED
    assert late.value.reason is UninitializedReason.STOPPED


async def test_running_are_those_that_are_not_over() -> None:
    """The oldest first; what is over is forgotten at once."""
    async with Supervisor() as supervisor:
        assert supervisor.running == ()
        tasks = [supervisor.schedule(read) for _ in range(3)]
        assert supervisor.running == tuple(tasks)
        over = supervisor.schedule(fetch)
        await over.wait()
        assert supervisor.running == tuple(tasks)
    assert supervisor.running == ()


async def test_what_is_running_can_be_looked_at_from_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if tasks come and go in the loop while the thread goes through them."""
    loop = threading.get_ident()
    come_and_gone: list[Task] = []

    def status(task: Task) -> TaskStatus:
        if threading.get_ident() != loop and not come_and_gone:
            anyio.from_thread.run(come_and_go)
        return see_status(task)

    async def come_and_go() -> None:
        come_and_gone.append(supervisor.schedule(read))
        tasks[1].cancel()
        await tasks[1].wait()
        await supervisor.turn()

    see_status = vars(Task)["status"].fget
    async with Supervisor() as supervisor:
        tasks = [supervisor.schedule(read) for _ in range(3)]
        await tasks[2].started.wait()
        monkeypatch.setattr(Task, "status", property(status))
        seen = await anyio.to_thread.run_sync(lambda: supervisor.running)
        monkeypatch.undo()

        assert seen == (tasks[0], tasks[2])
        assert supervisor.running == (tasks[0], tasks[2], *come_and_gone)


# Again, and elsewhere


async def test_a_supervisor_can_be_started_again() -> None:
    """Tests start one app many times."""
    supervisor = Supervisor()
    results: list[str] = []
    for book in ("atlas", "diary"):
        async with supervisor:
            results.append(await supervisor.schedule(fetch, book).wait())

    assert results == ["atlas", "diary"]


@pytest.mark.parametrize("second", BACKENDS)
@pytest.mark.parametrize("first", BACKENDS)
def test_a_supervisor_can_be_started_on_another_event_loop(first: Backend, second: Backend) -> None:
    """Of another kind, too: with coroutines and threads."""
    supervisor = Supervisor()

    async def main() -> list[Any]:
        async with supervisor:
            tasks: list[Task] = [supervisor.schedule(fetch), supervisor.schedule(str, 5)]
            return [await task.wait() for task in tasks]

    assert run_on(first, main) == run_on(second, main) == ["atlas", "5"]


@pytest.mark.parametrize("again", BACKENDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_that_ends_without_a_drain_takes_its_tasks_with_it(
    backend: Backend, again: Backend
) -> None:
    """They are cancelled with the loop, and the supervisor can be started on the next one."""
    supervisor = Supervisor()

    async def forget_to_drain() -> list[Task]:
        await supervisor.start()
        tasks = [supervisor.schedule(read), supervisor.schedule(read)]
        await tasks[0].started.wait()
        return [*tasks, supervisor.schedule(read)]

    async def main() -> str:
        async with supervisor:
            return await supervisor.schedule(fetch).wait()

    tasks = run_on(backend, forget_to_drain)
    between = supervisor.schedule(fetch)

    assert [task.status for task in (*tasks, between)] == [TaskStatus.CANCELLED] * 4
    assert run_on(again, main) == "atlas"


def test_a_loop_that_is_closed_under_its_tasks_loses_them(observed: Observed) -> None:
    """Nothing ran any more when it was closed: they are dropped, and each is told."""
    supervisor = Supervisor(observers=[observed])
    loop = asyncio.new_event_loop()
    loop.run_until_complete(supervisor.start())
    running = supervisor.schedule(read)
    loop.run_until_complete(running.started.wait())
    pending = in_plain_thread(lambda: supervisor.schedule(fetch))
    loop.close()
    too_late = supervisor.schedule(fetch)

    async def main() -> str:
        async with supervisor:
            await running.wait()
            return await supervisor.schedule(fetch).wait()

    assert asyncio.run(main()) == "atlas"
    for task in (running, pending, too_late):
        assert task.status is TaskStatus.CANCELLED
        assert observed.kinds(task)[-1] == "dropped"


def test_a_failure_that_was_being_handled_when_the_loop_was_closed_stays_one(
    observed: Observed,
) -> None:
    """The task was over, and only its handler is lost."""

    async def fail() -> None:
        raise ZeroDivisionError

    async def handle(task: Task, error: Exception) -> None:
        handling.set()
        await anyio.sleep_forever()

    supervisor = Supervisor(config=TaskConfig(on_error=handle), observers=[observed])
    loop = asyncio.new_event_loop()
    handling = asyncio.Event()
    loop.run_until_complete(supervisor.start())
    task = supervisor.schedule(fail)
    loop.run_until_complete(handling.wait())
    loop.close()

    async def main() -> None:
        async with supervisor:
            assert supervisor.running == ()

    asyncio.run(main())
    assert task.status is TaskStatus.FAILED
    assert observed.kinds(task) == ["scheduled", "started", "failed"]


async def misread() -> None:
    """Fail, so that a handler runs."""
    raise EOFError


async def read_again(task: Task, error: Exception) -> None:
    """Handle an error for ever."""
    await anyio.sleep_forever()


@pytest.mark.parametrize(
    ("reading", "config"),
    [(read, TaskConfig()), (misread, TaskConfig(on_error=read_again))],
    ids=["in its function", "in its error handler"],
)
def test_a_task_of_a_closed_loop_is_collected_without_a_trace_in_another_task(
    reading: Callable[[], Awaitable[None]], config: TaskConfig
) -> None:
    """Whichever task runs when the garbage collector comes, is the current one before and after."""
    lost = Supervisor()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(lost.start())
    loop.run_until_complete(lost.task(config).schedule(reading).started.wait())
    loop.run_until_complete(asyncio.sleep(0))  # to where it waits
    loop.close()
    del lost, loop

    collect_within_a_task()


def test_who_waits_in_a_loop_that_is_closed_is_lost_with_it(observed: Observed) -> None:
    """Nobody can be woken up there, which does not keep the supervisor from starting again."""
    supervisor = Supervisor(observers=[observed])
    loop = asyncio.new_event_loop()
    loop.run_until_complete(supervisor.start())
    lost = [supervisor.schedule(read), supervisor.schedule(read)]
    waiting = [loop.create_task(task.wait()) for task in lost]
    loop.run_until_complete(lost[-1].started.wait())
    loop.close()

    async def main() -> str:
        async with supervisor:
            return await supervisor.schedule(fetch).wait()

    assert asyncio.run(main()) == "atlas"
    for task in lost:
        assert task.status is TaskStatus.CANCELLED
        assert observed.kinds(task).count(TaskEventKind.DROPPED) == 1
    assert not any(waiter.done() for waiter in waiting)


def test_a_request_in_a_loop_that_is_closed_holds_nothing_up() -> None:
    """Its tasks cannot begin any more, and are not the next shutdown's affair."""
    supervisor = Supervisor()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(supervisor.start())
    connection = Connection(supervisor, supervisor.settings.config)
    stack = AsyncExitStack()
    scope = {"fastapi_inner_astack": stack, "fastapi_function_astack": stack}
    tasks = loop.run_until_complete(take(connection, scope))
    tasks.after_response.schedule(read)
    loop.close()

    async def main() -> DrainReport:
        await supervisor.start()
        return await supervisor.drain()

    assert asyncio.run(main()).never_started == ()


async def take(connection: Connection, scope: Scope) -> TasksScheduler:
    """Take the tasks of a request, in its loop."""
    return connection.take_scheduler(scope)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_loop_is_noticed_in_other_threads(backend: Backend, observed: Observed) -> None:
    """Scheduling there drops the task, says why, and does not raise what the loop raises."""
    supervisor = Supervisor(observers=[observed])
    run_on(backend, supervisor.start)
    task = in_plain_thread(lambda: supervisor.schedule(fetch))

    assert task.status is TaskStatus.CANCELLED
    assert "the event loop was closed" in observed.events[-1].reason


async def test_two_supervisors_are_apart() -> None:
    """Two apps in one process: draining one leaves the other's tasks alone."""
    gate = anyio.Event()
    async with Supervisor() as other:
        theirs = other.schedule(gate.wait)
        async with Supervisor() as supervisor:
            ours = supervisor.schedule(gate.wait)
            await ours.started.wait()
            assert (supervisor.running, other.running) == ((ours,), (theirs,))

        assert ours.status is TaskStatus.CANCELLED
        gate.set()
        await theirs.wait()
        assert theirs.status is TaskStatus.SUCCEEDED


async def test_a_supervisor_is_not_tied_to_the_task_that_started_it() -> None:
    """It may be started in one, schedule in a second and be drained in a third."""
    supervisor = Supervisor()
    tasks: list[Task] = []

    async def schedule() -> None:
        tasks.append(supervisor.schedule(read))

    for step in (supervisor.start, schedule):
        async with anyio.create_task_group() as group:
            group.start_soon(step)
    await tasks[0].started.wait()
    async with anyio.create_task_group() as group:
        group.start_soon(supervisor.drain)

    assert tasks[0].status is TaskStatus.CANCELLED


async def test_a_task_outlives_the_scope_it_was_scheduled_in() -> None:
    """The request that scheduled it may be cancelled, timed out or over."""
    async with Supervisor() as supervisor:
        gate = anyio.Event()
        with anyio.CancelScope() as scope:
            task = supervisor.schedule(gate.wait)
            scope.cancel()
            await anyio.lowlevel.checkpoint()
        await task.started.wait()
        gate.set()
        await task.wait()

    assert task.status is TaskStatus.SUCCEEDED


# From everywhere


async def test_tasks_begin_when_the_loop_is_free_and_not_before() -> None:
    """schedule() returns first: what it starts never runs in the middle of its caller."""
    order: list[str] = []

    async def work() -> None:
        order.append("task")

    async with Supervisor() as supervisor:
        supervisor.schedule(work)
        order.append("caller")
        await supervisor.turn()

        assert order == ["caller", "task"]


@pytest.mark.parametrize("plain", [False, True], ids=["worker", "plain"])
async def test_tasks_can_be_scheduled_in_any_thread(plain: bool) -> None:
    """In the loop's own worker threads, and in those that it does not know of."""
    async with Supervisor() as supervisor:

        def schedule() -> list[Task]:
            return [supervisor.schedule(fetch), supervisor.schedule(str, "diary")]

        tasks = await anyio.to_thread.run_sync(
            lambda: in_plain_thread(schedule) if plain else schedule()
        )

        assert [await task.wait() for task in tasks] == ["atlas", "diary"]


async def test_a_batch_can_be_released_in_any_thread(observed: Observed) -> None:
    """What is to start, starts, and what is to be dropped, is dropped."""
    async with Supervisor(observers=[observed]) as supervisor:
        batch = TasksScheduler(supervisor).after_response
        started, dropped = batch.task(run_if="always").schedule(fetch), batch.schedule(fetch)
        await anyio.to_thread.run_sync(lambda: batch.release(failed=True))
        await started.wait()
        await dropped.wait()

        assert (started.status, dropped.status) == (TaskStatus.SUCCEEDED, TaskStatus.CANCELLED)
        assert observed.kinds(dropped) == ["scheduled", "dropped"]


@pytest.mark.parametrize(
    "anyio_backend",
    [*BACKENDS, pytest.param(("asyncio", {"debug": True, "use_uvloop": True}), id="uvloop-debug")],
)
async def test_a_thread_that_cancels_before_the_start_wakes_up_who_waits() -> None:
    """In the loop in which they wait, whether or not it will ever be the supervisor's."""
    task = TasksScheduler(Supervisor()).after_response.schedule(fetch)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(task.wait)
            await anyio.wait_all_tasks_blocked()
            assert await anyio.to_thread.run_sync(in_plain_thread, task.cancel)

    assert task.status is TaskStatus.CANCELLED


async def test_a_release_says_whether_it_started_a_task() -> None:
    """Whoever releases a batch gives the event loop a turn then, and not in vain."""
    async with Supervisor() as supervisor:
        batch = TasksScheduler(supervisor).after_response
        batch.schedule(fetch)
        batch.task(run_if="always").schedule(fetch)
        batch.schedule(fetch)
        assert batch.release(failed=True)
        assert not batch.release(failed=True)

        batch = TasksScheduler(supervisor).after_response
        batch.schedule(fetch)
        assert not batch.release(failed=True)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize(
    "anyio_backend",
    [
        *BACKENDS,
        pytest.param(("asyncio", {"debug": True}), id="asyncio-debug"),
        pytest.param(("asyncio", {"debug": True, "use_uvloop": True}), id="uvloop-debug"),
    ],
)
async def test_a_batch_that_a_thread_releases_after_the_drain_wakes_up_who_waits(
    failed: bool,
) -> None:
    """The tasks are over at once, and those who wait for one hear of it in their own loop."""
    supervisor = Supervisor()
    await supervisor.start()
    batch = TasksScheduler(supervisor).after_response
    task = batch.schedule(fetch)

    def release() -> TaskStatus:
        batch.release(failed=failed)
        return task.status

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(task.wait)
            await anyio.wait_all_tasks_blocked()
            await supervisor.drain()
            status = await anyio.to_thread.run_sync(in_plain_thread, release)

    assert status is TaskStatus.CANCELLED


async def test_a_thread_that_is_faster_than_the_start_has_its_task_dropped(
    observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task is never started in another thread than that of the event loop."""
    supervisor = Supervisor(observers=[observed])
    early: list[Task] = []
    open_inbox = Inbox.open

    def open_too_late(inbox: Inbox, spawner: Spawner) -> None:
        early.append(in_plain_thread(lambda: supervisor.schedule(fetch)))
        open_inbox(inbox, spawner)

    monkeypatch.setattr(Inbox, "open", open_too_late)
    async with supervisor:
        assert supervisor.running == ()
        assert [task.status for task in early] == [TaskStatus.CANCELLED]
        assert observed.kinds() == ["scheduled", "dropped"]
        assert "not running" in observed.events[-1].reason
        assert await supervisor.schedule(fetch).wait() == "atlas"


def test_a_call_that_interrupts_another_one_does_not_wait_for_it() -> None:
    """A finalizer may schedule while its own thread does, and neither call gets lost."""
    inbox = Inbox()
    wake_ups: list[Callable[[], None]] = []
    calls: list[str] = []

    class Interrupted:
        def call_soon(self, func: Callable[[], None]) -> None:
            wake_ups.append(func)
            if len(wake_ups) == 1:
                inbox.put(calls.append, "finalizer's")

    inbox.open(cast(Spawner, Interrupted()))
    thread = threading.Thread(target=inbox.put, args=(calls.append, "thread's"), daemon=True)
    thread.start()
    thread.join(10)

    assert not thread.is_alive()
    for wake_up in wake_ups:
        wake_up()
    assert sorted(calls) == ["finalizer's", "thread's"]


@pytest.mark.parametrize(("step", "calls_before"), [("is_over", 1), ("give_up", 0)])
async def test_what_a_thread_cancels_while_the_loop_begins_it_is_cancelled(
    observed: Observed, monkeypatch: pytest.MonkeyPatch, step: str, calls_before: int
) -> None:
    """By the loop, to which the thread turns again."""
    supervisor = Supervisor(observers=[observed])
    batch = TasksScheduler(supervisor).after_response
    task = batch.schedule(read)
    take_step = getattr(supervisor_module, step)
    calls = iter(range(calls_before + 1))

    async def start_and_release() -> None:
        await supervisor.start()
        batch.release(failed=False)
        await task.started.wait()

    def interrupt(*args: object, **options: object) -> Any:
        if next(calls) == calls_before:
            monkeypatch.undo()
            anyio.from_thread.run(start_and_release)
        return take_step(*args, **options)

    monkeypatch.setattr(supervisor_module, step, interrupt)
    assert await anyio.to_thread.run_sync(task.cancel)
    await task.wait()
    await supervisor.drain()

    assert observed.kinds(task) == ["scheduled", "started", "cancelled"]


async def test_what_a_thread_does_twice_happens_once(observed: Observed) -> None:
    """The loop hears of it later, and by then the task may be over."""
    async with Supervisor(observers=[observed]) as supervisor:
        batch = TasksScheduler(supervisor).after_response
        task = batch.schedule(fetch)

        def give_up() -> list[bool]:
            answers = [task.cancel(), task.cancel()]
            batch.release(failed=True)
            return answers

        assert await anyio.to_thread.run_sync(give_up) == [True, True]
        await task.wait()
        await supervisor.turn()

        assert observed.kinds() == ["scheduled", "cancelled"]


async def test_a_plain_thread_wakes_a_sleeping_loop_up() -> None:
    """The task does not have to wait until something else happens."""
    async with Supervisor() as supervisor:
        started = anyio.Event()

        async def start() -> None:
            started.set()

        thread = threading.Thread(target=lambda: supervisor.schedule(start))
        thread.start()
        await started.wait()
        thread.join()


async def test_what_a_thread_schedules_runs_in_its_order() -> None:
    """The first one scheduled is the first one to take its step."""
    order: list[int] = []
    turns = [anyio.Event() for _ in range(5)]

    async def work(number: int) -> None:
        order.append(number)
        turns[number].set()

    async with Supervisor() as supervisor:

        def schedule() -> None:
            for number in range(5):
                supervisor.schedule(work, number)
                anyio.from_thread.run(turns[number].wait)

        await anyio.to_thread.run_sync(schedule)

    assert order == [0, 1, 2, 3, 4]


THREADS = 8


@pytest.mark.parametrize("attempt", range(3))
async def test_nothing_gets_lost_when_threads_schedule_into_a_drain(
    observed: Observed, attempt: int
) -> None:
    """Before it, into its beginning and its end, and after it: each task ends exactly once."""
    supervisor = Supervisor(observers=[observed], grace=attempt)
    before, drained = threading.Barrier(THREADS + 1), threading.Event()

    def schedule() -> list[Task]:
        shielded = supervisor.task(shield=True)
        tasks: list[Task] = []

        def schedule_some(times: int) -> None:
            for _ in range(times):
                tasks.extend((supervisor.schedule(fetch), shielded.schedule(fetch)))
            tasks.append(supervisor.schedule(int))

        schedule_some(10)
        before.wait()
        schedule_some(50)
        drained.wait()
        schedule_some(10)
        return tasks

    async with anyio.create_task_group() as group:
        await supervisor.start()
        results: list[list[Task]] = []

        async def collect() -> None:
            limiter = anyio.CapacityLimiter(1)
            results.append(await anyio.to_thread.run_sync(schedule, limiter=limiter))

        for _ in range(THREADS):
            group.start_soon(collect)
        await anyio.to_thread.run_sync(before.wait, limiter=anyio.CapacityLimiter(1))
        report = await supervisor.drain()
        drained.set()

    tasks = [task for result in results for task in result]
    ends = Counter(
        event.task
        for event in observed.events
        if event.kind in {"finished", "cancelled", "dropped"}
    )
    assert ends == Counter(tasks)
    succeeded = {task for task in tasks if task.status is TaskStatus.SUCCEEDED}
    assert {task.status for task in set(tasks) - succeeded} == {TaskStatus.CANCELLED}
    assert {event.task for event in observed.events if event.kind == "finished"} == succeeded
    assert set(report.finished) <= succeeded
    assert supervisor.running == ()


# Context variables

shelf: ContextVar[str] = ContextVar("shelf", default="none")


async def look() -> str:
    """Return the context variable."""
    await anyio.lowlevel.checkpoint()
    return shelf.get()


def look_in_thread() -> str:
    """Return the context variable, in a thread."""
    return shelf.get()


BOTH_LOOKS = pytest.mark.parametrize(
    "function", [look, look_in_thread], ids=["coroutine", "thread"]
)


@BOTH_LOOKS
async def test_context_variables_are_those_of_schedule(function: Callable[[], Any]) -> None:
    """Not those of the start-up, nor those of the moment when the task runs."""
    shelf.set("start-up")
    async with Supervisor() as supervisor:
        shelf.set("schedule")
        task = supervisor.schedule(function)
        shelf.set("later")

        assert await task.wait() == "schedule"


@BOTH_LOOKS
async def test_context_variables_of_a_batch_are_those_of_schedule(
    function: Callable[[], Any],
) -> None:
    """Also if it is released much later, in another context."""
    async with Supervisor() as supervisor:
        batch = TasksScheduler(supervisor).after_response
        shelf.set("schedule")
        task = batch.schedule(function)
        shelf.set("release")
        batch.release(failed=False)

        assert await task.wait() == "schedule"


@BOTH_LOOKS
async def test_context_variables_of_a_thread_are_those_of_schedule(
    function: Callable[[], Any],
) -> None:
    """A worker thread has its caller's, and may set its own; a plain one starts from none."""
    shelf.set("loop")
    async with Supervisor() as supervisor:

        def schedule() -> list[Task]:
            inherited = supervisor.schedule(function)
            shelf.set("thread")
            return [inherited, supervisor.schedule(function)]

        worker = await anyio.to_thread.run_sync(schedule)
        plain = await anyio.to_thread.run_sync(in_plain_thread, schedule)

        assert [await task.wait() for task in worker] == ["loop", "thread"]
        assert [await task.wait() for task in plain] == ["none", "thread"]


async def test_context_variables_of_a_sync_endpoint_reach_its_tasks(
    observed: Observed,
) -> None:
    """At all three moments, and other requests have nothing to do with it."""
    app = FastAPI()
    add_tasks(app, observers=[observed])

    @app.get("/")
    def lend(tasks: Tasks, name: str) -> None:
        shelf.set(name)
        for place in (tasks, tasks.after_route, tasks.after_response):
            place.schedule(look)
            place.schedule(look_in_thread)
        shelf.set("later")

    async with asgi.lifespan(app):
        for name in ("poetry", "maps"):
            await asgi.request(app, f"/?name={name}")
        await observed.all_over()

    tasks = [event.task for event in observed.events if event.kind == "scheduled"]
    assert [task.result() for task in tasks] == ["poetry"] * 6 + ["maps"] * 6


async def test_what_a_task_sets_stays_in_the_task() -> None:
    """Neither its caller nor its siblings see it."""

    async def relabel() -> None:
        shelf.set("relabelled")

    shelf.set("schedule")
    async with Supervisor() as supervisor:
        await supervisor.schedule(relabel).wait()

        assert await supervisor.schedule(look).wait() == shelf.get() == "schedule"


async def use_the_loop() -> str:
    """Use what asks which event loop there is."""
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 0)
    with anyio.move_on_after(60):
        await anyio.lowlevel.checkpoint()
    assert await anyio.to_thread.run_sync(lambda: 7) == 7
    return sniffio.current_async_library()


def use_the_loop_from_its_thread() -> str:
    """Do the same from a sync task."""
    return anyio.from_thread.run(use_the_loop)


@pytest.mark.parametrize("function", [use_the_loop, use_the_loop_from_its_thread])
@pytest.mark.parametrize("plain", [False, True], ids=["worker", "plain"])
async def test_a_task_from_a_thread_finds_its_event_loop(
    function: Callable[[], Any], plain: bool, anyio_backend_name: str
) -> None:
    """A thread's context says that there is none, and the task does not believe it."""
    async with Supervisor() as supervisor:

        def schedule() -> Task:
            return supervisor.schedule(function)

        task = await anyio.to_thread.run_sync(
            lambda: in_plain_thread(schedule) if plain else schedule()
        )

        assert await task.wait() == anyio_backend_name


# Who am I


async def who_am_i() -> Task:
    """Return the current task, after a while and from a child."""
    await anyio.lowlevel.checkpoint()
    return await anyio.to_thread.run_sync(current_task)


@pytest.mark.parametrize("function", [who_am_i, current_task], ids=["coroutine", "thread"])
async def test_a_task_can_ask_for_itself(function: Callable[[], Any]) -> None:
    """Its siblings are others; in a sync task's thread, too."""
    async with Supervisor() as supervisor:
        tasks = [supervisor.schedule(function) for _ in range(3)]

        assert [await task.wait() for task in tasks] == tasks


async def test_outside_of_a_task_there_is_none() -> None:
    """Also where one has been scheduled just before; the error says what to keep instead."""
    async with Supervisor() as supervisor:
        await supervisor.schedule(who_am_i).wait()
        with pytest.raises(NoCurrentTaskError, match=r"task = tasks\.schedule\(func\)") as caught:
            current_task()

    assert isinstance(caught.value, LookupError)


# The supervisor of here


async def test_the_supervisor_of_an_app_can_be_asked_for() -> None:
    """Before the app runs, and while it does: it is one and the same."""
    app, other = FastAPI(), FastAPI()
    add_tasks(app)
    add_tasks(other)
    supervisor = get_supervisor(app)

    assert isinstance(supervisor, BoundTasks)
    assert supervisor is not get_supervisor(other)
    async with asgi.lifespan(app):
        assert get_supervisor(app) is supervisor
        assert await get_supervisor(app).schedule(fetch).wait() == "atlas"


@pytest.mark.parametrize("app", [FastAPI(), Starlette(), APIRouter()])
async def test_an_app_without_tasks_has_no_supervisor(app: Any) -> None:
    """The error says which line is missing, also if it is no FastAPI app at all."""
    with pytest.raises(FastAPITasksUninitializedAppError, match=r"add_tasks\(app\)") as caught:
        get_supervisor(app)

    assert caught.value.reason is UninitializedReason.NO_ADD_TASKS


async def test_outside_of_tasks_and_requests_the_app_has_to_be_named() -> None:
    """The error says so."""
    with pytest.raises(FastAPITasksUninitializedAppError, match=r"get_supervisor\(app\)"):
        get_supervisor()


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_request_that_takes_tasks_has_a_supervisor(is_async: bool) -> None:
    """A service deep down in it need not be handed anything."""
    app = FastAPI()
    add_tasks(app)
    found: list[Supervisor] = []

    def lend_in_thread(tasks: Tasks) -> None:
        found.append(get_supervisor())

    async def lend(tasks: Tasks) -> None:
        found.append(get_supervisor())

    app.get("/")(lend if is_async else lend_in_thread)
    async with asgi.lifespan(app):
        await asgi.request(app, "/")
        with pytest.raises(FastAPITasksUninitializedAppError):
            get_supervisor()

    assert found == [get_supervisor(app)]


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_task_can_schedule_tasks(is_async: bool) -> None:
    """On its own supervisor, from the loop or its thread, and so on from there."""

    def follow_up_in_thread(times: int) -> Task | None:
        return get_supervisor().schedule(function, times - 1) if times else None

    async def follow_up(times: int) -> Task | None:
        return follow_up_in_thread(times)

    function: Any = follow_up if is_async else follow_up_in_thread
    async with Supervisor() as supervisor, Supervisor():
        task: Task | None = supervisor.schedule(function, 3)
        names: list[str] = []
        while task is not None:
            names.append(task.name)
            task = await task.wait()

    assert len(names) == 4


async def test_a_task_of_one_app_finds_its_own_supervisor_in_anothers_request() -> None:
    """The task is nearer than the request that it was scheduled in."""
    app = FastAPI()
    add_tasks(app)

    @app.get("/")
    async def lend(tasks: Tasks) -> None:
        task = elsewhere.schedule(find)
        assert await task.wait() is elsewhere
        assert get_supervisor() is get_supervisor(app)

    async def find() -> Supervisor:
        return get_supervisor()

    async with Supervisor() as elsewhere, asgi.lifespan(app):
        assert (await asgi.request(app, "/")).status == 200


# Sync tasks


async def test_sync_tasks_have_a_limit() -> None:
    """With two threads never more than two run, and all of them run at last."""
    gate, lock = threading.Event(), threading.Lock()
    running, most = 0, 0

    def shelve() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait()
        with lock:
            running -= 1

    async with Supervisor(threads=2) as supervisor:
        tasks = [supervisor.schedule(shelve) for _ in range(6)]
        while running < 2:
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        statuses = Counter(task.status for task in tasks)
        gate.set()
        for task in tasks:
            await task.wait()

    assert statuses == {TaskStatus.RUNNING: 2, TaskStatus.PENDING: 4}
    assert (most, running) == (2, 0)


async def test_sync_error_handlers_count_as_sync_tasks() -> None:
    """They are work in a thread, like what failed."""
    gate = threading.Event()
    handled: list[Task] = []

    def handle(task: Task, error: Exception) -> None:
        handled.append(task)

    async def lose() -> None:
        raise LookupError

    async with Supervisor(threads=1) as supervisor:
        blocking = supervisor.schedule(gate.wait)
        await blocking.started.wait()
        failed = supervisor.task(on_error=handle).schedule(lose)
        with contextlib.suppress(LookupError):
            await failed.wait()
        await anyio.wait_all_tasks_blocked()
        before = list(handled)
        gate.set()
        await idle(supervisor)

    assert (before, handled) == ([], [failed])


@pytest.mark.parametrize("tokens", [1, 40])
async def test_sync_tasks_do_not_starve_sync_endpoints(tokens: int) -> None:
    """Their threads are their own: the app answers while all of them are busy."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = tokens
    gate = threading.Event()
    app = FastAPI()
    add_tasks(app, threads=tokens)

    @app.get("/")
    def lend() -> str:
        return "atlas"

    async with asgi.lifespan(app):
        tasks = [get_supervisor(app).schedule(gate.wait) for _ in range(tokens + 1)]
        while sum(task.status is TaskStatus.RUNNING for task in tasks) < tokens:
            await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(20):
            response = await asgi.request(app, "/")
        gate.set()

    assert response.json() == "atlas"


async def test_sync_endpoints_do_not_starve_sync_tasks() -> None:
    """The other way round."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1
    gate, busy = threading.Event(), threading.Event()

    def block() -> None:
        busy.set()
        gate.wait()

    async with Supervisor() as supervisor, anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, block)
        while not busy.is_set():
            await anyio.lowlevel.checkpoint()
        task = supervisor.schedule(lambda: "shelved")
        with anyio.move_on_after(20):
            await task.wait()
        gate.set()

    assert task.result() == "shelved"


# asyncio's own


@pytest.mark.parametrize("anyio_backend", ASYNCIO_BACKENDS)
async def test_asyncio_tasks_carry_the_names_of_ours() -> None:
    """Debuggers and asyncio's own warnings show what it is about."""
    async with Supervisor() as supervisor:
        supervisor.task(name="catalogue").schedule(read)

        assert "catalogue" in {task.get_name() for task in asyncio.all_tasks()}


@pytest.mark.parametrize("anyio_backend", ASYNCIO_BACKENDS)
async def test_a_task_that_a_stranger_cancels_before_its_first_step_is_over(
    observed: Observed,
) -> None:
    """asyncio never runs it at all, and whoever waits must not wait for ever."""
    async with Supervisor(observers=[observed]) as supervisor:
        task = supervisor.task(name="catalogue").schedule(fetch)
        for native in asyncio.all_tasks():
            if native.get_name() == "catalogue":
                native.cancel()
        await task.wait()

        assert (task.status, task.attempt) == (TaskStatus.CANCELLED, 0)
        assert observed.kinds(task) == ["scheduled", "cancelled"]

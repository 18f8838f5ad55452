"""What ``schedule`` takes, and the task that it returns."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import itertools
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from fastapi_tasks import (
    FastAPITasksUninitializedAppError,
    InvalidTaskError,
    Progress,
    Supervisor,
    Task,
    TaskCancelledError,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    TaskFailedError,
    TaskNotFinishedError,
    TasksScheduler,
    TaskStatus,
    UninitializedReason,
    WrongEventLoopError,
    current_task,
)
from fastapi_tasks import tasks as tasks_module

from .conftest import ASYNCIO_BACKENDS


class SpoiltError(Exception):
    """What goes wrong in this module's kitchen."""


class Burglary(BaseException):
    """What is no Exception, and not to be kept from anybody."""


async def bake(bread: str, minutes: int = 30) -> str:
    """Return at once: the oven is fast."""
    return f"{bread} after {minutes} min"


def slice_up(bread: str, pieces: int = 2) -> list[str]:
    """Return the pieces."""
    return [bread] * pieces


async def burn() -> None:
    """Fail."""
    raise SpoiltError("black")


async def wait_on_the_shelf() -> None:
    """Run until somebody cancels it."""
    await anyio.Event().wait()


# What a task tells of itself


async def test_a_task_knows_its_call() -> None:
    """Function, arguments and merged configuration are there for whoever handles its error."""
    async with Supervisor(config=TaskConfig(shield=True)) as supervisor:
        task = supervisor.task(name="oven").schedule(bake, "rye", minutes=50)

        assert (task.func, task.args, task.kwargs) == (bake, ("rye",), {"minutes": 50})
        assert task.config == TaskConfig(name="oven", shield=True)


async def test_status_and_attempt_follow_the_run() -> None:
    """A task is pending, then running in its first attempt, then over."""
    seen: list[tuple[TaskStatus, int]] = []

    async def look() -> None:
        task = current_task()
        seen.append((task.status, task.attempt))

    async with Supervisor() as supervisor:
        task = supervisor.schedule(look)
        seen.append((task.status, task.attempt))
        await task.wait()
        seen.append((task.status, task.attempt))

    assert seen == [
        (TaskStatus.PENDING, 0),
        (TaskStatus.RUNNING, 1),
        (TaskStatus.SUCCEEDED, 1),
    ]


async def test_a_sync_task_is_running_in_its_thread() -> None:
    """Its status does not lag behind its thread."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(lambda: (current_task().status, current_task().attempt))

        assert await task.wait() == (TaskStatus.RUNNING, 1)


async def test_a_status_is_its_word() -> None:
    """So that it can be compared with, stored and logged as a plain string."""
    assert [str(status) for status in TaskStatus] == [
        "pending",
        "running",
        "succeeded",
        "failed",
        "cancelled",
    ]
    assert TaskStatus("failed") == "failed"


async def test_no_two_tasks_share_an_id() -> None:
    """Neither those of one supervisor, nor of two, nor of one that was started again."""
    supervisor, other = Supervisor(), Supervisor()
    ids: list[str] = []
    for _ in range(2):
        async with supervisor, other:
            ids += [place.schedule(bake, "rye").id for place in (supervisor, other) for _ in "ab"]

    assert all(isinstance(id, str) for id in ids)
    assert len(set(ids)) == 8


async def test_ids_are_drawn_anew_at_each_start() -> None:
    """A server may fork its workers after the app was made, and they write to one log."""
    supervisor = Supervisor()
    made = supervisor.schedule(bake, "rye").id
    async with supervisor:
        started = supervisor.schedule(bake, "rye").id

    assert made.split("-")[0] != started.split("-")[0]


def test_the_tasks_of_a_supervisor_are_numbered() -> None:
    """From one on, so that a log tells how many there were."""
    supervisor = Supervisor()
    ids = [supervisor.schedule(bake, "rye").id for _ in range(3)]

    assert [id.split("-")[1] for id in ids] == ["1", "2", "3"]


class Toaster:
    """Something that is called like a function, in both ways."""

    def __call__(self, bread: str) -> str:
        return f"{bread}, toasted"

    async def pop(self, bread: str) -> None:
        """Have a name."""


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (bake, "bake"),
        (functools.partial(functools.partial(bake, "rye"), minutes=1), "bake"),
        (Toaster(), "Toaster"),
        (Toaster().pop, "Toaster.pop"),
        (len, "len"),
    ],
)
async def test_a_task_is_named_after_its_function(function: Callable[..., Any], name: str) -> None:
    """By the name that one searches the code for, without the arguments of a partial."""
    supervisor = Supervisor()

    assert supervisor.schedule(function, "rye").name == name


async def test_a_configured_name_goes_before_the_functions() -> None:
    """So that two uses of one function can be told apart."""
    assert Supervisor().task(name="breakfast").schedule(bake, "rye").name == "breakfast"


async def test_repr_names_the_task_and_its_state() -> None:
    """Name, id and status, and none of the arguments."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(bake, "grandmother's secret sourdough")
        pending = repr(task)
        await task.wait()

        assert pending == f"<Task bake {task.id} pending>"
        assert repr(task) == f"<Task bake {task.id} succeeded>"


# started


async def test_started_is_set_when_the_function_begins() -> None:
    """Not before, even if somebody has looked at it and waits."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(wait_on_the_shelf)
        before = task.started.is_set()
        await task.started.wait()

        assert (before, task.status) == (False, TaskStatus.RUNNING)


@pytest.mark.parametrize("over", [False, True])
async def test_started_is_set_for_whoever_looks_late(over: bool) -> None:
    """The first look may come while the function runs, or when it is over."""
    running, gate = anyio.Event(), anyio.Event()

    async def work() -> None:
        running.set()
        await gate.wait()

    async with Supervisor() as supervisor:
        task = supervisor.schedule(work)
        await running.wait()
        if over:
            gate.set()
            await task.wait()

        assert task.started.is_set()


async def test_started_can_be_asked_for_in_a_thread_and_awaited_in_the_loop() -> None:
    """A thread that schedules hands the event to the loop, where it works like any other."""
    async with Supervisor() as supervisor:

        def schedule() -> tuple[Task[..., None], anyio.Event]:
            task = supervisor.schedule(wait_on_the_shelf)
            return task, task.started

        task, started = await anyio.to_thread.run_sync(schedule)
        await started.wait()

        assert task.status is TaskStatus.RUNNING


async def test_started_is_one_event() -> None:
    """Whoever asks first or last waits for the same thing."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(bake, "rye")
        before = task.started
        await task.wait()

        assert task.started is before


async def test_started_stays_unset_for_a_task_that_never_began() -> None:
    """A task that was dropped is over without having started."""
    task = Supervisor().schedule(bake, "rye")
    await task.wait()

    assert not task.started.is_set()


async def test_a_sync_task_has_not_started_while_it_waits_for_a_thread() -> None:
    """Started means that the function runs, not that it stands in a queue."""
    gate = threading.Event()
    async with Supervisor(threads=1) as supervisor:
        await supervisor.schedule(gate.wait).started.wait()
        second = supervisor.schedule(gate.wait)
        await anyio.wait_all_tasks_blocked()
        queued = (second.started.is_set(), second.status)
        gate.set()
        await second.wait()

    assert queued == (False, TaskStatus.PENDING)
    assert second.started.is_set()


# result, exception, wait


async def test_the_result_is_there_when_the_task_is_over() -> None:
    """wait() returns it, and result() afterwards."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(bake, "rye")

        assert await task.wait() == task.result() == "rye after 30 min"
        assert task.exception() is None


async def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    """wait() and result() raise it, exception() returns it: always the same object."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(burn)
        with pytest.raises(SpoiltError) as waited:
            await task.wait()
        with pytest.raises(SpoiltError) as asked:
            task.result()

    assert task.status is TaskStatus.FAILED
    assert waited.value is asked.value is task.exception()


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), Burglary()])
async def test_what_is_no_exception_does_not_end_who_asks_for_the_result(
    error: BaseException,
) -> None:
    """wait() and result() raise an error of ours, which it is the cause of; exception() is it."""

    async def break_in() -> None:
        raise error

    async with Supervisor() as supervisor:
        task = supervisor.schedule(break_in)
        with pytest.raises(TaskFailedError, match=rf"{task.id}.* {type(error).__name__}") as waited:
            await task.wait()
        with pytest.raises(TaskFailedError) as asked:
            task.result()

    assert waited.value.__cause__ is asked.value.__cause__ is task.exception() is error
    assert task.status is TaskStatus.FAILED


@pytest.mark.parametrize("ask", [Task.result, Task.exception])
async def test_there_is_no_result_before_the_end(ask: Callable[[Task], Any]) -> None:
    """Asking too early is an error that says how to wait, pending or running."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(wait_on_the_shelf)
        with pytest.raises(TaskNotFinishedError, match=rf"{task.id}.* pending") as pending:
            ask(task)
        await task.started.wait()
        with pytest.raises(TaskNotFinishedError, match=rf"{task.id}.* running"):
            ask(task)

    assert "await task.wait()" in str(pending.value)


async def test_a_cancelled_task_has_neither_result_nor_error() -> None:
    """wait() only says that it is over; result() is where its absence is an error."""
    async with Supervisor() as supervisor:
        task: Task = supervisor.schedule(anyio.sleep_forever)
        await task.started.wait()
        task.cancel()
        waited = await task.wait()

        assert (waited, task.exception()) == (None, None)
        with pytest.raises(TaskCancelledError, match=rf"sleep_forever \({task.id}\)"):
            task.result()


async def test_many_may_wait_for_a_task() -> None:
    """Each of them gets the result, whether it came before the end or after."""
    gate = anyio.Event()
    results: list[str] = []

    async def rest(bread: str) -> str:
        await gate.wait()
        return bread

    async with Supervisor() as supervisor:
        task = supervisor.schedule(rest, "rye")

        async def wait() -> None:
            results.append(await task.wait())

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            gate.set()
        await wait()

    assert results == ["rye"] * 4


async def test_giving_up_waiting_leaves_the_task_alone() -> None:
    """A waiter's cancellation is not the task's."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(wait_on_the_shelf)
        await task.started.wait()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await task.wait()

        assert scope.cancelled_caught
        assert task.status is TaskStatus.RUNNING


async def test_waiting_for_what_is_over_lets_others_run() -> None:
    """wait() is a checkpoint even if there is nothing to wait for."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(bake, "rye")
        await task.wait()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await task.wait()

        assert scope.cancelled_caught


async def test_a_task_cannot_be_waited_for_in_another_event_loop() -> None:
    """It would never be woken up there; the error says how to wait from a thread."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(wait_on_the_shelf)
        await task.started.wait()

        async def wait() -> None:
            with anyio.fail_after(10):
                await task.wait()

        with pytest.raises(WrongEventLoopError) as caught:
            await anyio.to_thread.run_sync(anyio.run, wait)

    assert isinstance(caught.value, RuntimeError)
    assert f"wait_on_the_shelf ({task.id})" in str(caught.value)
    assert "anyio.from_thread.run(task.wait)" in str(caught.value)


async def test_a_thread_can_wait_for_a_task_in_the_tasks_event_loop() -> None:
    """The line that the error names, works."""
    gate = anyio.Event()

    async def rest() -> str:
        await gate.wait()
        return "risen"

    async with Supervisor() as supervisor:
        task = supervisor.schedule(rest)
        waiter = supervisor.schedule(lambda: anyio.from_thread.run(task.wait))
        await waiter.started.wait()
        gate.set()

        assert await waiter.wait() == "risen"


async def test_what_is_over_can_be_waited_for_in_any_event_loop() -> None:
    """There is nothing to be woken up for."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(bake, "rye")
        result = await task.wait()

        assert await anyio.to_thread.run_sync(anyio.run, task.wait) == result


async def test_a_task_cannot_be_awaited_by_itself() -> None:
    """`await task` would be one character from `await task()`, which bakes a second bread."""
    async with Supervisor() as supervisor:
        assert not inspect.isawaitable(supervisor.schedule(bake, "rye"))


# cancel


async def test_a_pending_task_that_is_cancelled_never_begins() -> None:
    """Its function is not called at all."""
    called: list[str] = []
    async with Supervisor(grace=1) as supervisor:
        tasks: list[Task] = [
            supervisor.schedule(called.append, "call"),
            supervisor.schedule(bake, "rye"),
        ]

        assert [task.cancel() for task in tasks] == [True, True]
        assert {task.status for task in tasks} == {TaskStatus.CANCELLED}
        await anyio.wait_all_tasks_blocked()

    assert (called, [task.attempt for task in tasks]) == ([], [0, 0])


async def test_a_task_that_is_cancelled_while_it_waits_for_its_moment_never_begins() -> None:
    """The moment comes, and nothing starts and nobody is told of a drop."""
    async with Supervisor(grace=1) as supervisor:
        tasks = TasksScheduler(supervisor)
        task = tasks.after_response.schedule(bake, "rye")
        task.cancel()
        tasks.response_over(failed=False)
        await anyio.wait_all_tasks_blocked()

    assert (task.status, task.attempt) == (TaskStatus.CANCELLED, 0)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_task_that_never_begins_lets_go_of_its_context(cancelled: bool) -> None:
    """Whoever keeps the task does not keep the request that it was scheduled in."""
    async with Supervisor() as supervisor:
        batch = TasksScheduler(supervisor).after_response
        task = batch.schedule(bake, "rye")
        if cancelled:
            task.cancel()
        batch.release(failed=True)

    assert task.context is None


async def test_a_running_task_gets_the_loops_cancellation() -> None:
    """At its await, and it can clean up."""
    got: list[BaseException] = []

    async def work() -> None:
        try:
            await anyio.Event().wait()
        except BaseException as error:
            got.append(error)
            raise

    async with Supervisor() as supervisor:
        task = supervisor.schedule(work)
        await task.started.wait()

        assert task.cancel()
        await task.wait()
        assert task.status is TaskStatus.CANCELLED
        assert [type(error) for error in got] == [anyio.get_cancelled_exc_class()]


async def test_a_task_that_withstands_its_cancellation_is_what_it_becomes() -> None:
    """A function that catches the cancellation and returns has succeeded."""

    async def work() -> str:
        with contextlib.suppress(anyio.get_cancelled_exc_class()):
            await anyio.Event().wait()
        return "half-baked"

    async with Supervisor() as supervisor:
        task = supervisor.schedule(work)
        await task.started.wait()
        task.cancel()

        assert await task.wait() == "half-baked"
        assert task.status is TaskStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("function", "status"), [(list, TaskStatus.SUCCEEDED), (burn, TaskStatus.FAILED)]
)
async def test_what_is_over_cannot_be_cancelled(
    function: Callable[..., Any], status: TaskStatus
) -> None:
    """cancel() says so, and the task stays what it is."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(function)
        with contextlib.suppress(SpoiltError):
            await task.wait()

        assert not task.cancel()
        assert task.status is status


async def test_a_task_can_be_cancelled_once() -> None:
    """The second call finds it over."""
    task = TasksScheduler(Supervisor()).after_route.schedule(bake, "rye")

    assert [task.cancel(), task.cancel()] == [True, False]


async def test_a_task_can_be_cancelled_from_a_thread() -> None:
    """The cancellation is handed over to the task's loop."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(wait_on_the_shelf)
        await task.started.wait()

        assert await anyio.to_thread.run_sync(task.cancel)
        await task.wait()
        assert task.status is TaskStatus.CANCELLED


async def test_a_thread_that_runs_is_not_cancelled() -> None:
    """The sync function goes on to its end, and the task is what it became."""
    gate = threading.Event()

    def knead() -> str:
        gate.wait()
        return "dough"

    async with Supervisor() as supervisor:
        task = supervisor.schedule(knead)
        await task.started.wait()

        assert task.cancel()
        await anyio.wait_all_tasks_blocked()
        assert task.status is TaskStatus.RUNNING
        gate.set()
        assert await task.wait() == "dough"


async def test_a_sync_task_that_waits_for_a_thread_can_be_cancelled() -> None:
    """It never begins, and those behind it get the thread."""
    gate = threading.Event()
    async with Supervisor(threads=1) as supervisor:
        await supervisor.schedule(gate.wait).started.wait()
        second, third = supervisor.schedule(gate.wait), supervisor.schedule(gate.wait)
        await anyio.wait_all_tasks_blocked()
        second.cancel()
        await second.wait()
        gate.set()
        await third.wait()

    assert (second.status, second.attempt) == (TaskStatus.CANCELLED, 0)
    assert third.status is TaskStatus.SUCCEEDED


async def test_a_sync_task_that_is_cancelled_as_it_gets_its_thread_never_begins() -> None:
    """The thread goes to the next one."""
    gate = threading.Event()
    called: list[str] = []

    def cancel_the_second(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.FINISHED and event.task is first:
            second.cancel()

    async with Supervisor(threads=1, observers=[cancel_the_second]) as supervisor:
        first = supervisor.schedule(gate.wait)
        await first.started.wait()
        second = supervisor.schedule(called.append, "second")
        await anyio.wait_all_tasks_blocked()
        third = supervisor.schedule(called.append, "third")
        gate.set()
        await third.wait()

    assert called == ["third"]
    assert (second.status, second.attempt) == (TaskStatus.CANCELLED, 0)


async def test_a_cancellation_that_came_too_early_is_delivered_when_the_thread_is_over() -> None:
    """What the sync function returned to be awaited can be cancelled, unlike the thread."""
    gate = threading.Event()

    def prepare() -> Awaitable[None]:
        gate.wait()
        return anyio.lowlevel.checkpoint()

    async with Supervisor() as supervisor:
        task = supervisor.schedule(prepare)
        await task.started.wait()
        task.cancel()
        await anyio.wait_all_tasks_blocked()
        gate.set()
        await task.wait()

    assert task.status is TaskStatus.CANCELLED


# Calling a task


@pytest.mark.parametrize("function", [bake, slice_up], ids=["coroutine", "sync"])
async def test_calling_a_task_runs_its_function_again(function: Callable[..., Any]) -> None:
    """With the same arguments, and the value comes back to the caller."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(function, "rye", 5)
        first = await task.wait()

        assert await task() == first == (await bake("rye", 5) if function is bake else ["rye"] * 5)


async def test_calling_a_sync_task_does_not_block_the_loop() -> None:
    """The function runs in a thread again, and knows whose it is."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(lambda: (threading.get_ident(), current_task()))
        await task.wait()
        thread, current = await task()

    assert thread != threading.get_ident()
    assert current is task


async def test_calling_a_task_changes_nothing_of_it() -> None:
    """Status, attempt and result stay those of the run that was scheduled."""
    runs: list[int] = []

    async def count() -> int:
        runs.append(1)
        assert current_task() is task
        return len(runs)

    async with Supervisor() as supervisor:
        task = supervisor.schedule(count)
        await task.wait()

        assert await task() == 2
        assert (task.result(), task.status, task.attempt) == (1, TaskStatus.SUCCEEDED, 1)


async def test_the_error_of_a_call_is_the_callers() -> None:
    """It is raised there, and neither logged nor given to the error handler."""
    handled: list[Exception] = []
    calls: list[int] = []
    config = TaskConfig(on_error=lambda task, error: handled.append(error))

    async def fail_later() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise SpoiltError("second batch")

    async with Supervisor(config=config) as supervisor:
        task = supervisor.schedule(fail_later)
        await task.wait()
        with pytest.raises(SpoiltError, match="second batch"):
            await task()

    assert handled == []
    assert task.status is TaskStatus.SUCCEEDED


@pytest.mark.parametrize("first", ["task", "call"])
async def test_a_tasks_cancellation_is_not_that_of_somebody_elses_call(first: str) -> None:
    """Both go on in their threads, whichever ends first, and each is what its thread makes it."""
    entered = {"task": threading.Event(), "call": threading.Event()}
    gates = {"task": threading.Event(), "call": threading.Event()}
    names = iter(gates)
    called: list[str] = []
    over = anyio.Event()

    def knead() -> str:
        name = next(names)
        entered[name].set()
        gates[name].wait()
        return name

    async def call() -> None:
        called.append(await task())
        over.set()

    async with Supervisor() as supervisor:
        task = supervisor.schedule(knead)
        await anyio.to_thread.run_sync(entered["task"].wait)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                await anyio.to_thread.run_sync(entered["call"].wait)
                task.cancel()
                gates[first].set()
                await (task.wait if first == "task" else over.wait)()
                await anyio.wait_all_tasks_blocked()
                for gate in gates.values():
                    gate.set()
                await task.wait()
        finally:
            for gate in gates.values():
                gate.set()

    assert (task.status, called) == (TaskStatus.SUCCEEDED, ["call"])
    assert task.result() == "task"


async def test_somebody_elses_call_does_not_hold_up_a_cancellation() -> None:
    """The task itself is in no thread any more, and ends at its await."""
    gate, entered = threading.Event(), threading.Event()
    awaited = anyio.Event()
    calls: list[int] = []

    async def rest() -> None:
        awaited.set()
        await anyio.Event().wait()

    async def rise() -> None:
        await anyio.lowlevel.checkpoint()

    def knead() -> Awaitable[None]:
        calls.append(1)
        if len(calls) == 1:
            return rest()
        entered.set()
        gate.wait()
        return rise()

    async with Supervisor() as supervisor:
        task = supervisor.schedule(knead)
        await awaited.wait()
        async with anyio.create_task_group() as group:
            group.start_soon(task)
            await anyio.to_thread.run_sync(entered.wait)
            task.cancel()
            with anyio.move_on_after(10):
                await task.wait()
            status = task.status
            gate.set()

    assert (status, len(calls)) == (TaskStatus.CANCELLED, 2)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_BACKENDS)
async def test_a_task_that_calls_itself_is_not_cancelled_while_a_thread_runs_for_it() -> None:
    """The cancellation waits for the last of its threads; asyncio's would abandon that one."""
    gates, entered = [threading.Event(), threading.Event()], threading.Semaphore(0)
    first_over = anyio.Event()
    runs = itertools.count()

    async def call(note: Callable[[], object]) -> None:
        await current_task()()
        note()

    async def fold() -> None:
        await asyncio.gather(call(first_over.set), call(list))

    def knead() -> Awaitable[None] | None:
        run = next(runs)
        if run == 0:
            return fold()
        entered.release()
        gates[run - 1].wait()
        return None

    async with Supervisor() as supervisor:
        task = supervisor.schedule(knead)
        for _ in gates:
            await anyio.to_thread.run_sync(entered.acquire)
        task.cancel()
        gates[0].set()
        with anyio.move_on_after(10):
            await first_over.wait()
        await anyio.wait_all_tasks_blocked()
        status = task.status
        gates[1].set()
        await task.wait()

    assert (status, task.status) == (TaskStatus.RUNNING, TaskStatus.CANCELLED)


async def test_a_task_that_has_outlived_its_cancellation_can_be_called_again() -> None:
    """The cancellation was that of the run that is over."""
    gate = threading.Event()

    def knead() -> str:
        gate.wait()
        return "dough"

    async with Supervisor() as supervisor:
        task = supervisor.schedule(knead)
        await task.started.wait()
        task.cancel()
        gate.set()
        await task.wait()

        assert await task() == "dough"


async def test_a_task_of_a_supervisor_that_never_ran_cannot_be_called() -> None:
    """There is no event loop and no thread for it; the error says what is missing."""
    task = Supervisor().schedule(bake, "rye")

    with pytest.raises(FastAPITasksUninitializedAppError) as caught:
        await task()

    assert caught.value.reason is UninitializedReason.NOT_STARTED


async def test_a_call_leaves_the_callers_own_task_current() -> None:
    """Inside, the called task is the current one; afterwards, the caller's again."""

    async def call(other: Task[..., Task]) -> tuple[Task, Task]:
        return await other(), current_task()

    async def look() -> Task:
        return current_task()

    async with Supervisor() as supervisor:
        other = supervisor.schedule(look)
        await other.wait()
        caller = supervisor.schedule(call, other)

        assert await caller.wait() == (other, caller)


# Callables of every kind


class Mixer:
    """A callable of the other kind, and methods of all."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def stir(self, *args: Any, **kwargs: Any) -> Any:
        """Return what came."""
        return args, kwargs

    @classmethod
    async def whisk(cls, *args: Any, **kwargs: Any) -> Any:
        """Return what came."""
        return args, kwargs

    @staticmethod
    def beat(*args: Any, **kwargs: Any) -> Any:
        """Return what came."""
        return args, kwargs


async def mix(*args: Any, **kwargs: Any) -> Any:
    """Return what came."""
    return args, kwargs


def fold(*args: Any, **kwargs: Any) -> Any:
    """Return what came."""
    return args, kwargs


@functools.wraps(mix)
def mix_soon(*args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Return a coroutine, without being a coroutine function."""
    return mix(*args, **kwargs)


@functools.wraps(fold)
async def fold_soon(*args: Any, **kwargs: Any) -> Any:
    """Be a coroutine function that looks like another kind."""
    return fold(*args, **kwargs)


class Order:
    """A class whose instances are awaitable."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._came = args, kwargs

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from anyio.lowlevel.checkpoint().__await__()
        return self._came


KINDS: list[Any] = [
    pytest.param(mix, id="coroutine function"),
    pytest.param(fold, id="function"),
    pytest.param(lambda *args, **kwargs: (args, kwargs), id="lambda"),
    pytest.param(Mixer(), id="instance with async __call__"),
    pytest.param(Mixer().stir, id="method"),
    pytest.param(Mixer().whisk, id="async classmethod"),
    pytest.param(Mixer.beat, id="staticmethod"),
    pytest.param(Order, id="class of awaitables"),
    pytest.param(functools.partial(mix), id="partial of a coroutine function"),
    pytest.param(functools.partial(functools.partial(fold)), id="partial of a partial"),
    pytest.param(functools.partial(Mixer()), id="partial of an instance"),
    pytest.param(fold_soon, id="coroutine function that wraps a function"),
    pytest.param(mix_soon, id="function that wraps a coroutine function"),
]


@pytest.mark.parametrize("function", KINDS)
async def test_every_kind_of_callable_can_be_a_task(function: Callable[..., Any]) -> None:
    """It is called with the arguments, and awaited if there is something to await."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(function, 1, 2, salt=3)

        assert await task.wait() == ((1, 2), {"salt": 3})


@pytest.mark.parametrize("function", KINDS)
async def test_every_kind_of_callable_can_be_called_again(function: Callable[..., Any]) -> None:
    """`await task()` knows the same kinds as the first run."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(function, 1, salt=3)
        await task.wait()

        assert await task() == ((1,), {"salt": 3})


@pytest.mark.parametrize(
    "function", [Toaster(), functools.partial(Toaster())], ids=["instance", "partial"]
)
async def test_an_instance_with_a_sync_call_can_be_a_task(function: Callable[[str], str]) -> None:
    """Its `__call__` decides, not its class."""
    async with Supervisor() as supervisor:
        assert await supervisor.schedule(function, "rye").wait() == "rye, toasted"


async def test_a_class_can_be_a_task() -> None:
    """Its instance is the result."""
    async with Supervisor() as supervisor:
        assert isinstance(await supervisor.schedule(Toaster).wait(), Toaster)


def _thread() -> int:
    return threading.get_ident()


async def _async_thread() -> int:
    return threading.get_ident()


def _soon() -> Awaitable[int]:
    return _async_thread()


class _Where:
    def __call__(self) -> int:
        return threading.get_ident()


class _AsyncWhere:
    async def __call__(self) -> int:
        return threading.get_ident()


@pytest.mark.parametrize(
    ("function", "in_loop"),
    [
        (_async_thread, True),
        (functools.partial(_async_thread), True),
        (_AsyncWhere(), True),
        (_AsyncWhere().__call__, True),
        (_soon, True),
        (_thread, False),
        (functools.partial(_thread), False),
        (_Where(), False),
        (_Where().__call__, False),
    ],
)
async def test_what_can_block_runs_in_a_thread_and_what_awaits_in_the_loop(
    function: Callable[[], Any], in_loop: bool
) -> None:
    """A sync function must not hold up the loop; a coroutine must not leave it."""
    async with Supervisor() as supervisor:
        thread = await supervisor.schedule(function).wait()

    assert (thread == threading.get_ident()) is in_loop


@pytest.mark.parametrize("function", [mix, fold])
async def test_keyword_arguments_of_any_name_reach_the_function(
    function: Callable[..., Any],
) -> None:
    """Also those that schedule(), tasks and partials have parameters of the same name for."""
    names = ("func", "self", "args", "kwargs", "name", "config", "task", "context", "limiter")
    kwargs: dict[str, Any] = dict.fromkeys(names, "flour")
    async with Supervisor() as supervisor:
        task = supervisor.task(name="dough").schedule(function, **kwargs)

        assert await task.wait() == await task() == ((), kwargs)


async def test_wrong_arguments_are_the_tasks_failure() -> None:
    """The call itself happens in the task, so schedule() does not raise what it raises."""
    schedule: Callable[..., Task] = Supervisor.schedule
    async with Supervisor() as supervisor:
        task = schedule(supervisor, bake, "rye", sugar=1)
        with pytest.raises(TypeError, match="sugar"):
            await task.wait()

    assert task.status is TaskStatus.FAILED


# What cannot be a task


async def drip() -> AsyncIterator[int]:
    """Yield, asynchronously."""
    yield 1


def crumble() -> Iterator[int]:
    """Yield."""
    yield 1


class Sieve:
    """Generators of two kinds."""

    def __call__(self) -> Iterator[int]:
        yield 1

    async def sift(self) -> AsyncIterator[int]:
        """Yield, asynchronously."""
        yield 1


Place = Callable[[Supervisor], Any]

PLACES: list[Any] = [
    pytest.param(lambda supervisor: supervisor, id="supervisor"),
    pytest.param(lambda supervisor: supervisor.task(shield=True), id="configured"),
    pytest.param(TasksScheduler, id="immediate"),
    pytest.param(lambda supervisor: TasksScheduler(supervisor).after_route, id="after_route"),
    pytest.param(lambda supervisor: TasksScheduler(supervisor).after_response, id="after_response"),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("running", [True, False], ids=["running", "not running"])
async def test_what_is_not_callable_is_refused_at_schedule(place: Place, running: bool) -> None:
    """At the line that is wrong, wherever it schedules, and not when the moment has come."""
    supervisor = Supervisor()
    if running:
        await supervisor.start()
    with pytest.raises(InvalidTaskError) as caught:
        place(supervisor).schedule(42)
    if running:
        report = await supervisor.drain()
        assert report.finished == report.cancelled == report.never_started == ()

    assert isinstance(caught.value, TypeError)
    assert "got int, which cannot be called" in str(caught.value)
    assert "Write instead: schedule(" in str(caught.value)


async def test_a_call_in_the_place_of_a_function_is_refused_and_cleaned_up() -> None:
    """The error names the function and the line, and nobody is warned about the coroutine."""
    schedule: Callable[..., Task] = Supervisor().schedule
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        coroutine = bake("rye")
        with pytest.raises(InvalidTaskError) as caught:
            schedule(coroutine)
        state = inspect.getcoroutinestate(coroutine)
        del coroutine
        gc.collect()

    assert state == inspect.CORO_CLOSED
    assert "a coroutine, the result of calling bake" in str(caught.value)
    assert "schedule(bake, ...)" in str(caught.value)
    assert warned == []


SYNC_GENERATORS: list[Any] = [(crumble, "crumble"), (Sieve(), "Sieve")]
ASYNC_GENERATORS: list[Any] = [
    (drip, "drip"),
    (functools.partial(drip), "drip"),
    (Sieve().sift, "sift"),
]


@pytest.mark.parametrize(("function", "name"), SYNC_GENERATORS + ASYNC_GENERATORS)
async def test_a_generator_function_is_refused(function: Callable[..., Any], name: str) -> None:
    """Calling it would run none of its body, and the task would seem to have succeeded."""
    with pytest.raises(InvalidTaskError) as caught:
        Supervisor().schedule(function)

    assert f"the generator function {name}" in str(caught.value)
    assert f"{name}(...)" in str(caught.value).partition("Write instead:")[2]
    loop = "async for" if function in (pair[0] for pair in ASYNC_GENERATORS) else "with for"
    assert loop in str(caught.value)


@pytest.mark.parametrize("generator", [function for function, _ in ASYNC_GENERATORS])
async def test_a_function_that_iterates_is_a_task(
    generator: Callable[[], AsyncIterator[int]],
) -> None:
    """What the error says to write instead, works."""

    async def consume() -> list[int]:
        return [item async for item in generator()]

    async with Supervisor() as supervisor:
        assert await supervisor.schedule(consume).wait() == [1]


@pytest.mark.parametrize("generator", [function for function, _ in SYNC_GENERATORS])
async def test_a_function_that_iterates_in_a_thread_is_a_task(
    generator: Callable[[], Iterator[int]],
) -> None:
    """So it does for a generator that may block."""
    async with Supervisor() as supervisor:
        assert await supervisor.schedule(lambda: list(generator())).wait() == [1]


async def test_a_task_that_is_dropped_as_somebody_begins_to_wait_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever of both comes first, nobody waits for what will not come."""
    make_event = anyio.Event

    def drop_meanwhile() -> anyio.Event:
        task.cancel()
        return make_event()

    async with Supervisor() as supervisor:
        task = TasksScheduler(supervisor).after_response.schedule(bake, "rye")
        with monkeypatch.context() as patch, anyio.fail_after(10):
            patch.setattr(anyio, "Event", drop_meanwhile)
            assert await task.wait() is None

    assert task.status is TaskStatus.CANCELLED


async def test_what_few_tasks_have_is_kept_by_the_first_who_sets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread may be faster between the look and the lock, and nothing of it is lost."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(anyio.sleep, 0)

        @contextmanager
        def lock() -> Iterator[None]:
            with monkeypatch.context() as patch:
                patch.setattr(tasks_module, "_making_rare", nullcontext())
                task.set_progress(1, 2)
            yield

        with monkeypatch.context() as patched:
            patched.setattr(tasks_module, "_making_rare", lock())
            task.cancel_reason = "noon"

        assert task.cancel_reason == "noon"
        assert task.progress == Progress(done=1, total=2)
        assert not supervisor.schedule(anyio.sleep, 0).abandoned
    assert Task.abandoned is vars(Task)["abandoned"]


async def test_a_task_that_the_loop_has_just_claimed_is_not_given_up() -> None:
    """Between this and its status there is nothing that a thread could wait for."""
    async with Supervisor() as supervisor:
        task = TasksScheduler(supervisor).after_route.schedule(anyio.sleep, 0)
        del task._is_unclaimed

        assert not tasks_module.settle_unbegun(task)
        assert task.status is TaskStatus.PENDING

"""What a failed task touches: its record and its error handler, and nothing else."""

from __future__ import annotations

import asyncio
import functools
import gc
import heapq
import logging
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from fastapi import FastAPI

from fastapi_tasks import (
    FastAPITasksError,
    InvalidTaskError,
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    Tasks,
    TasksScheduler,
    TaskStatus,
    add_tasks,
    current_task,
    get_supervisor,
)

from . import asgi
from .clocks import Backend
from .conftest import BACKENDS
from .recording import Observed, idle, ours


class LeakError(Exception):
    """What goes wrong in this module's plumbing."""


class Flood(BaseException):
    """What is no Exception, and is not known to anybody."""


async def leak() -> None:
    """Fail."""
    raise LeakError("the cellar is wet")


def leak_in_thread() -> None:
    """Fail in a thread."""
    raise LeakError("the attic is wet")


async def flow(litres: int = 1) -> int:
    """Succeed, a bit later."""
    await anyio.lowlevel.checkpoint()
    return litres


async def over(*tasks: Task) -> None:
    """Wait until tasks are over, however they end."""
    for task in tasks:
        with suppress(BaseException):
            await task.wait()


async def check_that_it_works(supervisor: Supervisor) -> None:
    """Fail unless a supervisor still runs tasks."""
    assert await supervisor.schedule(flow).wait() == 1


# One record


@pytest.mark.parametrize("function", [leak, leak_in_thread])
async def test_a_failure_is_one_record(
    function: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It has name, id and attempt, for people in the message and for machines as fields."""
    async with Supervisor() as supervisor:
        task = supervisor.task(name="cellar").schedule(function)
        await idle(supervisor)

    (record,) = ours(caplog)
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"Task cellar ({task.id}) failed in attempt 1"
    assert {field: vars(record)[f"task_{field}"] for field in ("name", "id", "attempt")} == {
        "name": "cellar",
        "id": task.id,
        "attempt": 1,
    }


async def test_the_record_shows_where_it_happened(caplog: pytest.LogCaptureFixture) -> None:
    """With the traceback of the function's own error."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(leak)
        await idle(supervisor)

    (record,) = ours(caplog)
    assert record.exc_info is not None
    assert record.exc_info[1] is task.exception()
    assert "the cellar is wet" in caplog.text
    assert "in leak" in caplog.text


@pytest.mark.parametrize("function", [leak, leak_in_thread])
async def test_the_traceback_begins_in_the_function(function: Callable[[], Any]) -> None:
    """How the function came to be called is the same for every task, and tells nothing."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(function)
        await idle(supervisor)

    error = task.exception()
    assert error is not None
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)] == [
        function.__name__
    ]


async def test_the_traceback_does_not_grow_with_those_who_ask() -> None:
    """Each sees how the error came to it, and not how it came to the others."""
    lengths: list[int] = []
    async with Supervisor() as supervisor:
        task = supervisor.schedule(leak)
        await idle(supervisor)
        for _ in range(3):
            with pytest.raises(LeakError) as caught:
                await task.wait()
            lengths.append(len(caught.traceback))

    assert len(set(lengths)) == 1


@pytest.mark.parametrize("function", [leak, leak_in_thread])
async def test_a_failed_task_is_forgotten_without_the_garbage_collector(
    function: Callable[[], Any],
) -> None:
    """It and its error do not keep one another."""
    async with Supervisor() as supervisor:
        gc.disable()
        try:
            task = weakref.ref(supervisor.schedule(function))
            await idle(supervisor)
            await anyio.wait_all_tasks_blocked()
            assert task() is None
        finally:
            gc.enable()


async def test_an_error_keeps_nothing_of_what_its_task_has_run_in() -> None:
    """Somebody may keep it for long, and a context can hold much."""

    class Cargo:
        """What a request has put into its context."""

    def schedule() -> Task:
        cargo = Cargo()
        in_context.append(weakref.ref(cargo))
        hold.set(cargo)
        return supervisor.schedule(leak)

    hold: ContextVar[Cargo] = ContextVar("hold")
    in_context: list[weakref.ref[Cargo]] = []
    async with Supervisor() as supervisor:
        gc.disable()
        try:
            task = copy_context().run(schedule)
            await idle(supervisor)
            await anyio.wait_all_tasks_blocked()
            assert task.exception() is not None
            assert [cargo() for cargo in in_context] == [None]
        finally:
            gc.enable()


async def test_what_goes_well_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """At the levels that servers show, only what somebody has to know."""
    caplog.set_level(logging.INFO)
    async with Supervisor() as supervisor:
        await supervisor.schedule(flow).wait()

        assert ours(caplog) == []


# Nothing else


async def test_siblings_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """Those before, those after and those that run meanwhile."""
    async with Supervisor() as supervisor:
        valve = anyio.Event()

        async def hold() -> str:
            await valve.wait()
            return "held"

        meanwhile = supervisor.schedule(hold)
        await meanwhile.started.wait()
        failed = [supervisor.schedule(leak), supervisor.schedule(leak_in_thread)]
        beside = supervisor.schedule(flow, 2)
        await over(*failed)
        later = supervisor.schedule(flow, 3)
        valve.set()

        assert [await task.wait() for task in (meanwhile, beside, later)] == ["held", 2, 3]
        await idle(supervisor)
    assert len(ours(caplog)) == len(failed)


async def test_app_and_response_are_untouched(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the moment, the client gets what the endpoint returned, and so does the next."""
    app = FastAPI()
    add_tasks(app)

    @app.get("/")
    async def water(tasks: Tasks, litres: int) -> int:
        for place in (tasks, tasks.after_route, tasks.after_response):
            place.schedule(leak)
            place.schedule(leak_in_thread)
        return litres

    async with asgi.lifespan(app):
        first = await asgi.request(app, "/?litres=1")
        await idle(get_supervisor(app))
        second = await asgi.request(app, "/?litres=2")
        await idle(get_supervisor(app))

    assert (first.status, first.json(), second.status, second.json()) == (200, 1, 200, 2)
    assert len(ours(caplog)) == 12


# Errors of every kind


ERRORS: list[Any] = [
    pytest.param(error, id=type(error).__name__)
    for error in (
        LeakError(),
        SystemExit(1),
        GeneratorExit(),
        Flood(),
        ExceptionGroup("two", [LeakError(), OSError()]),
        BaseExceptionGroup("worse", [LeakError(), Flood()]),
        StopIteration(),
        StopAsyncIteration(),
        TimeoutError(),
    )
]


def in_loop(error: BaseException) -> Callable[[], Awaitable[None]]:
    """Return a coroutine function that raises an error."""

    async def burst() -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    return burst


def in_thread(error: BaseException) -> Callable[[], None]:
    """Return a function that raises an error."""

    def burst() -> None:
        raise error

    return burst


@pytest.mark.parametrize("error", ERRORS)
async def test_no_error_of_a_coroutine_escapes(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """SystemExit in a task is a failed task, and not a dead server."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(in_loop(error))
        await idle(supervisor)

        assert task.status is TaskStatus.FAILED
        await check_that_it_works(supervisor)
        await idle(supervisor)
    assert [record.levelno for record in ours(caplog)] == [logging.ERROR]


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), Flood(), LeakError()])
async def test_no_error_of_a_thread_escapes(error: BaseException) -> None:
    """It is the task's, as if the function had been awaited."""
    async with Supervisor() as supervisor:
        task = supervisor.schedule(in_thread(error))
        await idle(supervisor)

        assert (task.status, task.exception()) == (TaskStatus.FAILED, error)
        await check_that_it_works(supervisor)
        await idle(supervisor)


@pytest.mark.parametrize("error", ERRORS)
async def test_error_handlers_get_exceptions_only(error: BaseException) -> None:
    """A handler's signature says Exception: what is none has no business there."""
    handled: list[Exception] = []

    async def handle(task: Task, error: Exception) -> None:
        handled.append(error)

    async with Supervisor() as supervisor:
        task = supervisor.task(on_error=handle).schedule(in_loop(error))
        await idle(supervisor)

    assert handled == [task.exception()] * isinstance(error, Exception)


async def test_a_stray_cancellation_is_not_a_failure(
    anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A CancelledError that nobody asked for is a warning; trio knows no such thing."""
    handled: list[Exception] = []
    config = TaskConfig(on_error=lambda task, error: handled.append(error))
    async with Supervisor(config=config) as supervisor:
        task = supervisor.schedule(in_loop(asyncio.CancelledError()))
        await check_that_it_works(supervisor)
        await idle(supervisor)
    (record,) = ours(caplog)
    assert (task.status, record.levelno) == (
        (TaskStatus.FAILED, logging.ERROR)
        if anyio_backend_name == "trio"
        else (TaskStatus.CANCELLED, logging.WARNING)
    )
    assert handled == []


@pytest.mark.parametrize(
    ("others", "status"), [([], TaskStatus.CANCELLED), ([LeakError()], TaskStatus.FAILED)]
)
async def test_a_group_is_a_cancellation_if_it_is_nothing_else(
    others: list[BaseException], status: TaskStatus
) -> None:
    """An error beside the cancellations is not lost among them."""

    async def regroup() -> None:
        try:
            await anyio.Event().wait()
        except BaseException as error:
            raise BaseExceptionGroup("all", [error, *others]) from None

    async with Supervisor() as supervisor:
        task = supervisor.schedule(regroup)
        await task.started.wait()
        task.cancel()
        await idle(supervisor)

    assert task.status is status


async def test_cancellations_have_no_error_handler() -> None:
    """Neither one while the task runs nor one before it began is anybody's error."""
    handled: list[Exception] = []
    config = TaskConfig(on_error=lambda task, error: handled.append(error))
    async with Supervisor(config=config) as supervisor:
        running = supervisor.schedule(anyio.Event().wait)
        await running.started.wait()
        pending = supervisor.schedule(flow)
        dropped = TasksScheduler(supervisor).after_response.schedule(flow)
        for task in (running, pending, dropped):
            task.cancel()
        await idle(supervisor)

    assert handled == []


async def test_an_error_during_the_clean_up_is_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A task that was cancelled and then goes wrong has not just been cancelled."""

    async def spill() -> None:
        try:
            await anyio.Event().wait()
        finally:
            raise LeakError("bucket")

    async with Supervisor() as supervisor:
        task = supervisor.schedule(spill)
        await task.started.wait()
        task.cancel()
        await idle(supervisor)

    assert isinstance(task.exception(), LeakError)
    assert [record.levelno for record in ours(caplog)] == [logging.ERROR]


@pytest.mark.parametrize("kind", ["sync", "async", "returns-awaitable"])
async def test_an_error_during_the_clean_up_is_handled_like_any_other(kind: str) -> None:
    """The cancellation was the function's, and does not reach its error handler."""
    handled: list[Exception] = []

    def handle(task: Task, error: Exception) -> None:
        handled.append(error)

    async def handle_soon(task: Task, error: Exception) -> None:
        await anyio.lowlevel.checkpoint()
        handled.append(error)

    def handle_later(task: Task, error: Exception) -> Awaitable[None]:
        return handle_soon(task, error)

    async def spill() -> None:
        try:
            await anyio.Event().wait()
        finally:
            raise LeakError("bucket")

    handlers = {"sync": handle, "async": handle_soon, "returns-awaitable": handle_later}
    async with Supervisor(config=TaskConfig(on_error=handlers[kind])) as supervisor:
        task = supervisor.schedule(spill)
        await task.started.wait()
        task.cancel()
        await idle(supervisor)

    assert handled == [task.exception()]


async def test_the_handler_of_a_thread_that_was_to_be_cancelled_runs_on() -> None:
    """Nor does a cancellation that the sync function never felt."""
    gate = threading.Event()
    handled: list[Exception] = []

    def spill_in_thread() -> None:
        gate.wait()
        raise LeakError("bucket")

    async def retry(task: Task, error: Exception) -> None:
        with suppress(LeakError):
            await task()
        await anyio.lowlevel.checkpoint()
        handled.append(error)

    async with Supervisor(config=TaskConfig(on_error=retry)) as supervisor:
        task = supervisor.schedule(spill_in_thread)
        await task.started.wait()
        task.cancel()
        gate.set()
        await idle(supervisor)

    assert handled == [task.exception()]


# KeyboardInterrupt


def interrupt_in_thread() -> None:
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt


async def interrupt(*args: object) -> None:
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt


async def interrupt_in_group(*args: object) -> None:
    """Do what Ctrl-C does to a function that has opened a task group."""
    raise BaseExceptionGroup("pipes", [LeakError("bucket"), KeyboardInterrupt()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("function", "config"),
    [
        pytest.param(interrupt, TaskConfig(), id="coroutine"),
        pytest.param(interrupt_in_group, TaskConfig(), id="group"),
        pytest.param(interrupt_in_thread, TaskConfig(), id="thread"),
        pytest.param(leak, TaskConfig(on_error=interrupt), id="handler"),
        pytest.param(leak, TaskConfig(on_error=interrupt_in_group), id="group-in-handler"),
    ],
)
def test_ctrl_c_passes_through(
    backend: Backend,
    function: Callable[[], Any],
    config: TaskConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever presses it wants the process to end, whatever runs just then.

    The event loop has nothing to complain of.
    """
    tasks: list[Task] = []
    gc.collect()  # other tests have left tasks in loops that they have closed
    caplog.clear()

    async def main() -> None:
        async with Supervisor(config=config) as supervisor:
            tasks.append(supervisor.schedule(function))
            await idle(supervisor)

    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend[0], backend_options=backend[1])
    gc.collect()

    assert tasks[0].status is TaskStatus.FAILED
    assert {record.name for record in caplog.records} == {"fastapi_tasks"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_passes_through_observers(backend: Backend) -> None:
    """Also where every other exception is caught."""

    def observe(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.FINISHED:
            raise KeyboardInterrupt

    async def main() -> None:
        async with Supervisor(observers=[observe]) as supervisor:
            supervisor.schedule(flow)
            await idle(supervisor)

    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend[0], backend_options=backend[1])


# The error handler


class Plumber:
    """Handlers that are no plain functions."""

    def __init__(self) -> None:
        self.called: list[tuple[Task, Exception, Task, bool]] = []

    def note(self, task: Task, error: Exception) -> None:
        """Keep what came, and where."""
        in_loop = threading.current_thread() is threading.main_thread()
        self.called.append((task, error, current_task(), in_loop))

    async def note_soon(self, task: Task, error: Exception) -> None:
        """Do the same in the loop."""
        await anyio.lowlevel.checkpoint()
        self.note(task, error)

    def note_later(self, task: Task, error: Exception) -> Awaitable[None]:
        """Return something that does it when it is awaited."""
        return self.note_soon(task, error)

    async def __call__(self, task: Task, error: Exception) -> None:
        await self.note_soon(task, error)


HANDLERS: list[Any] = [
    pytest.param(lambda plumber: plumber.note, id="sync"),
    pytest.param(lambda plumber: plumber.note_soon, id="async"),
    pytest.param(lambda plumber: plumber, id="instance"),
    pytest.param(lambda plumber: functools.partial(plumber.note_soon), id="partial"),
    pytest.param(lambda plumber: plumber.note_later, id="returns-awaitable"),
]


@pytest.mark.parametrize("make_handler", HANDLERS)
@pytest.mark.parametrize("function", [leak, leak_in_thread])
async def test_the_handler_gets_the_task_and_its_error(
    make_handler: Callable[[Plumber], Any], function: Callable[[], Any]
) -> None:
    """Once, whatever kind of function it is, with the task as the current one."""
    plumber = Plumber()
    async with Supervisor() as supervisor:
        task = supervisor.task(on_error=make_handler(plumber)).schedule(function)
        await idle(supervisor)

    assert [called[:3] for called in plumber.called] == [(task, task.exception(), task)]


async def test_a_sync_handler_may_block() -> None:
    """It runs in a thread, like a sync task."""
    threads: list[int] = []

    def handle(task: Task, error: Exception) -> None:
        threads.append(threading.get_ident())

    async with Supervisor(config=TaskConfig(on_error=handle)) as supervisor:
        supervisor.schedule(leak)
        await idle(supervisor)

    assert len(threads) == 1
    assert threads != [threading.get_ident()]


async def test_an_async_handler_runs_in_the_loop() -> None:
    """So that it can use what belongs to the loop: sessions, locks, clients."""
    threads: list[int] = []

    async def handle(task: Task, error: Exception) -> None:
        threads.append(threading.get_ident())

    async with Supervisor(config=TaskConfig(on_error=handle)) as supervisor:
        supervisor.schedule(leak_in_thread)
        await idle(supervisor)

    assert threads == [threading.get_ident()]


async def test_the_handler_is_left_alone_when_all_goes_well() -> None:
    """It is for errors only."""
    plumber = Plumber()
    async with Supervisor() as supervisor:
        await supervisor.task(on_error=plumber).schedule(flow).wait()
        await idle(supervisor)

    assert plumber.called == []


@pytest.mark.parametrize("function", [leak, leak_in_thread])
@pytest.mark.parametrize("is_async", [True, False])
async def test_whoever_waits_goes_on_before_the_handler_runs(
    function: Callable[[], Any], is_async: bool
) -> None:
    """The task is over when its function is; the handler is not part of it."""
    order: list[str] = []

    def handle(task: Task, error: Exception) -> None:
        order.append(f"handler of a {task.status} task")

    async def handle_soon(task: Task, error: Exception) -> None:
        handle(task, error)

    async with Supervisor() as supervisor:
        handler: Any = handle_soon if is_async else handle
        task = supervisor.task(on_error=handler).schedule(function)
        with pytest.raises(LeakError):
            await task.wait()
        order.append("wait() returned")
        await idle(supervisor)

    assert order == ["wait() returned", "handler of a failed task"]


async def test_the_supervisor_waits_for_a_shielded_tasks_handler() -> None:
    """Its shutdown is not over before, though the task is."""
    called, repaired = anyio.Event(), anyio.Event()
    order: list[str] = []

    async def repair(task: Task, error: Exception) -> None:
        called.set()
        await repaired.wait()
        order.append("repaired")

    async def shut_down() -> None:
        await supervisor.drain()
        order.append("shut down")

    supervisor = Supervisor(config=TaskConfig(shield=True, on_error=repair))
    await supervisor.start()
    task = supervisor.schedule(leak)
    await called.wait()
    async with anyio.create_task_group() as group:
        group.start_soon(shut_down)
        await anyio.wait_all_tasks_blocked()
        assert supervisor.running == (task,)
        repaired.set()

    assert order == ["repaired", "shut down"]


async def break_tools(task: Task, error: Exception) -> None:
    """Fail to handle the failure."""
    raise OSError("no wrench")


def break_tools_in_thread(task: Task, error: Exception) -> None:
    """Fail to handle the failure, in a thread."""
    raise OSError("no wrench")


async def leave(task: Task, error: Exception) -> None:
    """Try to end the process."""
    raise SystemExit


@pytest.mark.parametrize("handler", [break_tools, break_tools_in_thread, leave])
async def test_a_handler_that_raises_is_logged_and_that_is_all(
    handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One record more, of the same task; the task's error stays its own."""
    async with Supervisor() as supervisor:
        task = supervisor.task(on_error=handler).schedule(leak)
        await check_that_it_works(supervisor)
        await idle(supervisor)
    assert isinstance(task.exception(), LeakError)
    failed, handler_failed = ours(caplog)
    assert handler_failed.getMessage() == f"on_error of task leak ({task.id}) failed"
    assert handler_failed.levelno == logging.ERROR
    assert vars(handler_failed)["task_id"] == vars(failed)["task_id"] == task.id


async def test_a_handler_that_hangs_holds_up_nothing_but_itself() -> None:
    """Siblings go on, and at shutdown it goes the way of its task: it is cancelled."""
    cancelled: list[bool] = []

    async def hang(task: Task, error: Exception) -> None:
        try:
            await anyio.Event().wait()
        except anyio.get_cancelled_exc_class():
            cancelled.append(True)
            raise

    async with Supervisor() as supervisor:
        task = supervisor.task(on_error=hang).schedule(leak)
        await over(task)
        await anyio.wait_all_tasks_blocked()
        await check_that_it_works(supervisor)

    assert cancelled == [True]
    assert task.status is TaskStatus.FAILED


# Running it again


class Pump:
    """A function that works at its third call."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[int, str]] = []

    async def start(self, pressure: int, *, fuel: str) -> str:
        """Fail, or not."""
        self.calls.append((pressure, fuel))
        if self.errors:
            raise self.errors.pop(0)
        return "running"

    def start_in_thread(self, pressure: int, *, fuel: str) -> str:
        """Fail, or not, in a thread."""
        return anyio.from_thread.run(functools.partial(self.start, pressure, fuel=fuel))


class Persistent:
    """An error handler that tries again, a few times."""

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self.called = 0
        self.errors: list[Exception] = []
        self.result: object = None

    async def __call__(self, task: Task, error: Exception) -> None:
        self.called += 1
        for _ in range(self.attempts - 1):
            try:
                self.result = await task()
            except LeakError as again:
                self.errors.append(again)
            else:
                return
        self.result = await task()


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_handler_can_run_the_function_again(
    in_thread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same arguments, as often as it likes; each failure is raised to the handler."""
    errors = [LeakError("first"), LeakError("second"), LeakError("third")]
    pump, retry = Pump(*errors), Persistent(attempts=4)
    async with Supervisor() as supervisor:
        function = pump.start_in_thread if in_thread else pump.start
        task = supervisor.task(on_error=retry).schedule(function, 3, fuel="diesel")
        await idle(supervisor)

    assert pump.calls == [(3, "diesel")] * 4
    assert retry.errors == errors[1:]
    assert (retry.called, retry.result) == (1, "running")
    assert (task.status, task.exception(), task.attempt) == (TaskStatus.FAILED, errors[0], 1)
    assert len(ours(caplog)) == 1


async def test_a_handler_that_gives_up_is_not_called_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last error leaves the handler, and is logged as the handler's."""
    pump, retry = Pump(*(LeakError(str(n)) for n in range(5))), Persistent(attempts=2)
    async with Supervisor() as supervisor:
        task = supervisor.task(on_error=retry).schedule(pump.start, 3, fuel="diesel")
        await idle(supervisor)

    assert (len(pump.calls), retry.called) == (3, 1)
    assert str(task.exception()) == "0"
    failed, gave_up = ours(caplog)
    assert [str(record.exc_info and record.exc_info[1]) for record in (failed, gave_up)] == [
        "0",
        "2",
    ]


# Observers and logs that fail themselves


@pytest.mark.parametrize("error", [LeakError(), SystemExit(), Flood(), asyncio.CancelledError()])
async def test_an_observer_that_raises_is_logged_and_touches_nothing(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the tasks, not the other observers, not the code that schedules."""

    def stumble(event: TaskEvent) -> None:
        raise error

    before, after = Observed(), Observed()
    async with Supervisor(observers=[before, stumble, after]) as supervisor:
        good, bad = supervisor.schedule(flow), supervisor.schedule(leak)
        await idle(supervisor)

    assert (good.status, bad.status) == (TaskStatus.SUCCEEDED, TaskStatus.FAILED)
    assert before.events == after.events
    assert before.kinds(good) == ["scheduled", "started", "finished"]
    about_it = [record for record in ours(caplog) if "observer" in record.getMessage()]
    assert len(about_it) == len(before.events)
    assert all("stumble" in record.getMessage() for record in about_it)


@contextmanager
def broken_log(error: BaseException) -> Iterator[None]:
    """Let the package's log raise on every record."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise error

    logger, handler = logging.getLogger("fastapi_tasks"), Broken()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


async def test_a_log_that_raises_touches_nothing(
    observed: Observed, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be logged goes to standard error, and the tasks and observers go on."""
    with broken_log(OSError("disk full")):
        async with Supervisor(observers=[observed]) as supervisor:
            bad = supervisor.task(on_error=break_tools).schedule(leak)
            await idle(supervisor)
            good = supervisor.schedule(flow)

            assert await good.wait() == 1
        dropped = supervisor.schedule(flow)

    assert observed.kinds(bad) == ["scheduled", "started", "failed", "handler_failed"]
    assert observed.kinds(dropped) == ["scheduled", "dropped"]
    assert "disk full" in capsys.readouterr().err


# Arguments are private

SECRET = "hunter2"


async def pay(card: str, *, pin: str) -> None:
    """Fail, and have a secret in every frame."""
    await anyio.lowlevel.checkpoint()
    raise LeakError("declined")


def pay_in_thread(card: str, *, pin: str) -> None:
    """Do the same in a thread."""
    raise LeakError("declined")


async def pay_for_ever(card: str, *, pin: str) -> None:
    """Run until somebody cancels it."""
    await anyio.Event().wait()


async def test_arguments_are_nowhere_to_be_seen(
    caplog: pytest.LogCaptureFixture, observed: Observed, anyio_backend_name: str
) -> None:
    """Not in a repr, a record at any level, an event, a report or the loop's own tasks."""
    caplog.set_level(logging.DEBUG)
    shown: list[object] = []
    config = TaskConfig(on_error=break_tools)
    async with Supervisor(config=config, observers=[observed]) as supervisor:
        funcs = (pay, pay_in_thread, pay_for_ever, functools.partial(pay_for_ever, card=SECRET))
        tasks = [
            supervisor.schedule(function, *[SECRET][: function in funcs[:3]], pin=SECRET)
            for function in funcs
        ]
        tasks[3].cancel()
        late = TasksScheduler(supervisor).after_response
        late.schedule(pay, SECRET, pin=SECRET)
        await tasks[2].started.wait()
        if anyio_backend_name == "asyncio":
            shown += asyncio.all_tasks()
        shown += [*tasks, *supervisor.running, supervisor]
        late.release(failed=True)
        await over(tasks[0], tasks[1])
    tasks.append(supervisor.schedule(pay, SECRET, pin=SECRET))
    for task in tasks:
        with suppress(LeakError):
            try:
                task.result()
            except FastAPITasksError as error:
                shown.append(error)

    kinds = {event.kind for event in observed.events}
    assert kinds >= {"failed", "handler_failed", "cancelled", "dropped", "drain_finished"}
    assert SECRET in repr(tasks[0].args)
    text = "\n".join(
        [
            caplog.text,
            *(repr(vars(record)) for record in ours(caplog)),
            *(f"{thing} {thing!r}" for thing in [*shown, *tasks, *observed.events]),
            *(f"{event.report} {event.reason} {event.error!r}" for event in observed.events),
        ]
    )
    assert "pay" in text
    assert SECRET not in text


@pytest.mark.parametrize(
    "make",
    [
        lambda: pay(SECRET, pin=SECRET),
        lambda: SECRET,
        lambda: [SECRET],
        lambda: functools.partial(heapq.merge, SECRET),
    ],
)
def test_errors_about_the_function_do_not_show_its_arguments(make: Callable[[], Any]) -> None:
    """Even though it is the argument that is wrong."""
    with pytest.raises(InvalidTaskError) as caught:
        Supervisor().schedule(make())

    assert SECRET not in f"{caught.value} {caught.value!r}"

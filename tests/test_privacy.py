"""Nobody who reads logs, reprs, errors or responses sees what a task was given (guarantee 16).

Each scene lets many tasks have one fate. Every one of them has a secret, each in another way, and
everything that anybody could read is searched for it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import gc
import heapq
import logging
import pickle
import tempfile
import threading
import warnings
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import uvloop
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import ResponseValidationError
from starlette.types import Message

from fastapi_tasks import (
    AddTasksError,
    FastAPITasksError,
    FastAPITasksUninitializedAppError,
    InvalidSettingError,
    InvalidTaskError,
    RunIf,
    Supervisor,
    SupervisorStateError,
    Task,
    TaskCancelledError,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    TaskFailedError,
    TaskNotFinishedError,
    Tasks,
    TasksScheduler,
    WrongEventLoopError,
    add_tasks,
    current_task,
    drain,
    get_supervisor,
)
from fastapi_tasks import (
    task as configured,
)

from .asgi import lifespan, request
from .private import COROUTINES, SECRET, Fate, Order, ScheduleOne, Till, schedule, take
from .servers import PATIENCE, serve
from .telemetry import Telemetry

# Everything that anybody could read


def _on_trio() -> bool:
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


class Outputs(logging.Handler):
    """Every text that came about in a test; it is the root logger's handler, too."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        super().__init__()
        self._capfd = capfd
        self._texts: list[str] = []
        self.kinds: set[TaskEventKind] = set()
        self.add = self._texts.append
        self._telemetry = Telemetry()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record as a formatter does that leaves no attribute out."""
        self.add(self.format(record))
        self.add(repr(record.__dict__))

    def observe(self, event: TaskEvent) -> None:
        """Be an observer that prints whatever it is told of, and traces it."""
        self.kinds.add(event.kind)
        self._telemetry.observer(event)
        self.show(event, event.report, event.error, event.reason, *event.tasks)
        # What a task is like in the middle of things, and not only in the end.
        self.show_surroundings()

    def show(self, *things: object) -> None:
        """Keep what printing the things would print, and what pickling them complains about."""
        for thing in things:
            self.add(f"{thing} {thing!s} {thing!r} {thing!a} {[thing]}")
            try:
                pickle.dumps(thing)  # those who have the bytes were given the arguments
            except Exception as error:
                self.add(f"{error} {error!r}")

    def show_task(self, task: Task) -> None:
        """Keep how a task looks, and what it answers when it is asked for what it cannot give."""
        self.show(task, task.name, task.id, task.config, task.status, task.cancel_reason)
        self.show(task.handle, task.context, task.started)
        for ask in (task.result, task.exception):
            try:
                ask()
            except Exception as error:
                self.show(error)

    def show_surroundings(self) -> None:
        """Keep how the event loop and the threads name what they are running."""
        self.add(repr(threading.enumerate()))
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            self.add(file.read())
        if _on_trio():
            self._show_trio(trio.lowlevel.current_root_task())
        else:
            self._show_asyncio()

    def _show_trio(self, task: trio.lowlevel.Task | None) -> None:
        assert task is not None
        self.add(f"{task!r} {task.name} {task.coro!r} {task.context!r}")
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                self._show_trio(child)

    def _show_asyncio(self) -> None:
        with suppress(RuntimeError):  # an observer may be told something in another thread
            for task in asyncio.all_tasks():
                self.add(f"{task!r} {task.get_name()} {task.get_coro()!r}")

    @contextmanager
    def of_the_loop(self) -> Generator[None, None, None]:
        """Let the running event loop say as much as it ever does."""
        if _on_trio():
            yield
            return
        loop = asyncio.get_running_loop()
        before = loop.get_debug(), loop.slow_callback_duration, loop.get_exception_handler()
        loop.set_exception_handler(self.handle_context)
        loop.set_debug(True)
        loop.slow_callback_duration = -1  # every callback is slow, and shown with its arguments
        try:
            yield
        finally:
            debug, loop.slow_callback_duration, handler = before
            loop.set_debug(debug)
            loop.set_exception_handler(handler)

    def handle_context(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Be the event loop's handler for what it cannot tell anybody."""
        self.show(context, *context.values())
        loop.default_exception_handler(context)

    def read(self) -> str:
        """Return everything; standard output, standard error and spans included."""
        self._texts += self._capfd.readouterr()
        return "\n".join([*self._texts, *self._telemetry.told()])

    def with_secret(self) -> list[str]:
        """Return the lines that have the secret."""
        return [line for line in self.read().splitlines() if SECRET in line]


@pytest.fixture
def outputs(capfd: pytest.CaptureFixture[str]) -> Iterator[Outputs]:
    """Everything that anybody could read of what the test does."""
    outputs = Outputs(capfd)
    root = logging.getLogger()
    level = root.level
    root.addHandler(outputs)
    root.setLevel(logging.DEBUG)
    yield outputs
    root.setLevel(level)
    root.removeHandler(outputs)


async def over(*tasks: Task) -> set[str]:
    """Wait until tasks are over, and return what they have become."""
    with anyio.fail_after(PATIENCE):
        for task in tasks:
            with suppress(Exception):
                await task.wait()
    return {str(task.status) for task in tasks}


async def begun(*tasks: Task) -> None:
    """Wait until tasks have begun."""
    with anyio.fail_after(PATIENCE):
        for task in tasks:
            await task.started.wait()


# Fates


class DeclinedError(Exception):
    """An error whose own text has no secret."""


async def end_well() -> None:
    """Let the task succeed."""


async def decline() -> None:
    """Let the task fail."""
    raise DeclinedError("declined")


async def decline_many() -> None:
    """Let the task fail in the manner of a task group."""
    raise ExceptionGroup("several", [DeclinedError("declined"), DeclinedError("no")])


async def leave() -> None:
    """Let the task fail with what should end the process."""
    raise SystemExit(3)


async def wait_for_ever() -> None:
    """Let the task wait for its cancellation."""
    await anyio.sleep_forever()


async def ring(task: Task, error: Exception, code: str = SECRET) -> None:
    """Be an error handler that has a secret too, and fails."""
    raise DeclinedError("no signal")


def ring_in_thread(task: Task, error: Exception, code: str = SECRET) -> None:
    """Be another one, for a thread."""
    raise DeclinedError("no signal")


async def run_again(task: Task, error: Exception) -> None:
    """Be an error handler that tries it once more."""
    assert current_task() is task
    await task()


# Scenes


Scene = Callable[[Outputs], Awaitable[list[Task]]]


async def _all_end_in(outputs: Outputs, fate: Fate, status: str, **settings: Any) -> list[Task]:
    """Run tasks to their ends, with somebody who looks at them all the time."""

    async def be_looked_at() -> None:
        outputs.show_surroundings()
        await fate()

    async with Supervisor(observers=[outputs.observe], **settings) as supervisor:
        tasks = schedule(supervisor, be_looked_at)
        for task in tasks:
            outputs.show_task(task)
        assert await over(*tasks) == {status}
        outputs.show(supervisor, supervisor.running, supervisor.task(name="charge"))
    return tasks


async def success(outputs: Outputs) -> list[Task]:
    """They return what they were given."""
    return await _all_end_in(outputs, end_well, "succeeded")


async def failure(outputs: Outputs) -> list[Task]:
    """They raise."""
    tasks = await _all_end_in(outputs, decline, "failed")
    assert "failed in attempt 1" in outputs.read()
    return tasks


async def failure_of_many(outputs: Outputs) -> list[Task]:
    """They raise a group."""
    return await _all_end_in(outputs, decline_many, "failed")


async def failure_that_ends_no_process(outputs: Outputs) -> list[Task]:
    """They raise what is no exception, and whoever waits for them is told so."""
    # Not from threads, since there the fate itself runs in the loop, which it would end.
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        tasks = schedule(supervisor, leave, COROUTINES)
        for task in tasks:
            with pytest.raises(TaskFailedError) as caught:
                await task.wait()
            outputs.show(caught.value)
    return tasks


async def failure_of_handler(outputs: Outputs) -> list[Task]:
    """They raise, and so does their error handler."""
    handler = functools.partial(ring, code=SECRET)
    tasks = await _all_end_in(outputs, decline, "failed", config=TaskConfig(on_error=handler))
    assert TaskEventKind.HANDLER_FAILED in outputs.kinds
    return tasks


async def failure_of_handler_in_thread(outputs: Outputs) -> list[Task]:
    """They raise, and so does their error handler, which is sync."""
    handler = functools.partial(ring_in_thread, code=SECRET)
    tasks = await _all_end_in(outputs, decline, "failed", config=TaskConfig(on_error=handler))
    assert TaskEventKind.HANDLER_FAILED in outputs.kinds
    return tasks


async def second_attempt(outputs: Outputs) -> list[Task]:
    """They raise, and do it again when their error handler tries once more."""
    tasks = await _all_end_in(outputs, decline, "failed", config=TaskConfig(on_error=run_again))
    assert TaskEventKind.HANDLER_FAILED in outputs.kinds
    return tasks


async def wrong_arguments(outputs: Outputs) -> list[Task]:
    """They cannot be called with what they were given, and Python says so."""
    wrong: list[ScheduleOne] = [
        lambda tasks: tasks.schedule(ring, *[SECRET] * 4),  # type: ignore[arg-type, call-arg]
        lambda tasks: tasks.schedule(ring, SECRET, task=SECRET),  # type: ignore[arg-type, call-arg]
        lambda tasks: tasks.schedule(ring_in_thread, card=SECRET),  # type: ignore[call-arg]
        lambda tasks: tasks.schedule(functools.partial(ring_in_thread, SECRET)),
    ]
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        tasks = schedule(supervisor, end_well, wrong)
        assert await over(*tasks) == {"failed"}
        for task in tasks:
            outputs.show(task.exception())
    assert "TypeError" in outputs.read()
    return tasks


async def cancelled_before_the_first_step(outputs: Outputs) -> list[Task]:
    """They are cancelled as soon as they are scheduled."""
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        tasks = schedule(supervisor, wait_for_ever)
        for task in tasks:
            task.cancel()
        assert await over(*tasks) == {"cancelled"}
    return tasks


async def cancelled_midway(outputs: Outputs) -> list[Task]:
    """They are cancelled while they run, those in threads in vain."""
    released = anyio.Event()
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        tasks = schedule(supervisor, released.wait)
        await begun(*tasks)
        for task in tasks:
            task.cancel()
            outputs.show_task(task)
        released.set()
        assert "cancelled" in await over(*tasks)
    return tasks


async def cancelled_by_others(outputs: Outputs) -> list[Task]:
    """They raise the loop's cancellation without having been cancelled."""
    cancelled = anyio.get_cancelled_exc_class()

    async def stray() -> None:
        if _on_trio():
            with trio.CancelScope() as scope:
                scope.cancel()
                try:
                    await trio.lowlevel.checkpoint()
                except trio.Cancelled as error:
                    kept = error
            raise kept
        raise cancelled

    async with Supervisor(observers=[outputs.observe]) as supervisor:
        tasks = schedule(supervisor, stray, COROUTINES)
        assert await over(*tasks) == {"cancelled"}
    assert "did not come from its supervisor" in outputs.read()
    return tasks


async def dropped_after_an_error(outputs: Outputs) -> list[Task]:
    """They wait for a moment that does not come."""
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        scheduler = TasksScheduler(supervisor)
        tasks = schedule(scheduler.after_route, end_well) + schedule(
            scheduler.after_response, end_well
        )
        outputs.show(scheduler, scheduler.after_route, scheduler.after_response)
        outputs.show(scheduler.after_response.task(run_if="always"))
        scheduler.response_over(failed=True)
        assert await over(*tasks) == {"cancelled"}
    assert 'the task has run_if="success"' in outputs.read()
    return tasks


async def dropped_outside_of_the_supervisors_time(outputs: Outputs) -> list[Task]:
    """They are scheduled before its start and after its drain."""
    supervisor = Supervisor(observers=[outputs.observe])
    tasks = schedule(supervisor, end_well)
    async with supervisor:
        pass
    tasks += schedule(supervisor, end_well)
    assert await over(*tasks) == {"cancelled"}
    return tasks


async def dropped_during_the_drain(outputs: Outputs) -> list[Task]:
    """They are scheduled, unshielded, by a shielded task that the drain waits for."""
    draining = anyio.Event()

    def note(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.DRAIN_STARTED:
            draining.set()

    async def schedule_late() -> None:
        await draining.wait()
        tasks.extend(schedule(supervisor, end_well))

    tasks: list[Task] = []
    async with Supervisor(observers=[outputs.observe, note]) as supervisor:
        await begun(supervisor.task(shield=True).schedule(schedule_late))
    assert await over(*tasks) == {"cancelled"}
    return tasks


async def drained(outputs: Outputs) -> list[Task]:
    """They are cancelled by a drain, or waited for, which is told every ten seconds."""
    released = anyio.Event()

    def release(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.DRAIN_WAITING:
            released.set()

    supervisor = Supervisor(observers=[outputs.observe, release])
    await supervisor.start()
    tasks = schedule(supervisor.task(shield=True), released.wait)
    tasks += schedule(supervisor, wait_for_ever, COROUTINES)
    await begun(*tasks)
    report = await supervisor.drain()
    outputs.show(report, report.finished, report.cancelled)
    assert outputs.kinds >= {"drain_cancelling", "drain_waiting", "drain_finished"}
    return tasks


async def abandoned(outputs: Outputs) -> list[Task]:
    """They do not end in time."""
    released = anyio.Event()

    async def swallow() -> None:
        while not released.is_set():
            with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                await released.wait()

    supervisor = Supervisor(observers=[outputs.observe], shutdown_timeout=0.01)
    await supervisor.start()
    tasks = schedule(supervisor, swallow)
    await begun(*tasks)
    report = await supervisor.drain()
    outputs.show(report, report.abandoned)
    for each in tasks:
        outputs.show_task(each)
    outputs.show_surroundings()
    released.set()
    await over(*tasks)
    assert TaskEventKind.DRAIN_ABANDONING in outputs.kinds
    return tasks


async def scheduled_in_a_thread(outputs: Outputs) -> list[Task]:
    """They come from a thread, which asks for their results, too."""
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        tasks = await anyio.to_thread.run_sync(schedule, supervisor, end_well)
        assert await over(*tasks) == {"succeeded"}
    return tasks


async def waited_for_in_another_loop(outputs: Outputs) -> list[Task]:
    """They cannot be waited for from there, and the error says so."""
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        tasks = schedule(supervisor, wait_for_ever, COROUTINES)
        for task in tasks:
            with pytest.raises(WrongEventLoopError) as caught:
                await anyio.to_thread.run_sync(anyio.run, task.wait)
            outputs.show(caught.value)
            with pytest.raises(TaskNotFinishedError) as early:
                task.result()
            outputs.show(early.value)
    for task in tasks:
        with pytest.raises(TaskCancelledError) as late:
            task.result()
        outputs.show(late.value)
    return tasks


async def misused_supervisor(outputs: Outputs) -> list[Task]:
    """They run while their supervisor is started and drained at the wrong time."""
    supervisor = Supervisor(observers=[outputs.observe])
    tasks = []
    with pytest.raises(SupervisorStateError) as caught:
        await supervisor.drain()
    outputs.show(caught.value)
    async with supervisor:
        tasks = schedule(supervisor, end_well)
        with pytest.raises(SupervisorStateError) as caught:
            await supervisor.start()
        outputs.show(caught.value)
        await over(*tasks)
    return tasks


SCENES: list[Scene] = [
    success,
    failure,
    failure_of_many,
    failure_that_ends_no_process,
    failure_of_handler,
    failure_of_handler_in_thread,
    second_attempt,
    wrong_arguments,
    cancelled_before_the_first_step,
    cancelled_midway,
    cancelled_by_others,
    dropped_after_an_error,
    dropped_outside_of_the_supervisors_time,
    dropped_during_the_drain,
    drained,
    abandoned,
    scheduled_in_a_thread,
    waited_for_in_another_loop,
    misused_supervisor,
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
async def test_what_a_task_was_given_is_shown_nowhere(
    scene: Scene, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a record, a repr, an event, a report, an error, nor in what the event loop says."""
    monkeypatch.setattr(drain, "WARN_EVERY", 0.01)
    with outputs.of_the_loop(), anyio.fail_after(PATIENCE):
        tasks = await scene(outputs)
        outputs.show_surroundings()
    for task in tasks:
        outputs.show_task(task)
        outputs.show(TaskEvent(TaskEventKind.FINISHED, (task,)))
    assert len({task.id for task in tasks}) == len(tasks) > 3
    text = outputs.read()
    assert all(task.name in text for task in tasks)
    assert outputs.with_secret() == []


# Beside the tasks: settings, errors, the end of a loop


async def watch(code: str, event: TaskEvent) -> None:
    """Be what cannot be an observer."""


class Broken(Till):
    """An observer whose repr tells all, and who raises."""

    def __call__(self, event: TaskEvent) -> None:  # type: ignore[override]
        """Be told of an event."""
        raise DeclinedError("no disk")


@pytest.mark.parametrize(
    "call",
    [
        lambda supervisor: supervisor.schedule(SECRET),
        lambda supervisor: supervisor.schedule([SECRET]),
        lambda supervisor: supervisor.schedule(Order(code=SECRET)),
        lambda supervisor: supervisor.schedule(take(SECRET)),
        lambda supervisor: supervisor.schedule(functools.partial(heapq.merge, SECRET)),
        lambda supervisor: supervisor.task(functools.partial(take, SECRET)),
        lambda supervisor: supervisor.task(Order(code=SECRET)),
        lambda supervisor: supervisor.task(Till(SECRET).charge, name="charge"),
        lambda supervisor: TaskConfig(name=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: TaskConfig(shield=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: TaskConfig(run_if=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: TaskConfig(on_error=functools.partial(heapq.merge, SECRET)),  # type: ignore[arg-type]
        lambda supervisor: TaskConfig(on_error=take(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: Supervisor(config=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: Supervisor(observers=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: Supervisor(observers=[functools.partial(watch, SECRET)]),  # type: ignore[list-item]
        lambda supervisor: Supervisor(grace=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: Supervisor(shutdown_timeout=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: Supervisor(threads=Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: add_tasks(Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: configured(name="charge")(SECRET),  # type: ignore[type-var]
        lambda supervisor: configured(name="charge")(Till(SECRET).charge),
        lambda supervisor: get_supervisor(Till(SECRET)),  # type: ignore[arg-type]
        lambda supervisor: supervisor.task(run_if="error").schedule(take, SECRET),
    ],
)
def test_an_error_of_ours_does_not_show_the_value_that_is_wrong(
    call: Callable[[Supervisor], object], outputs: Outputs
) -> None:
    """It names the type; whoever gave a number or a name instead, sees that."""
    with pytest.raises(FastAPITasksError) as caught:
        call(Supervisor())

    outputs.show(caught.value, *caught.value.args)
    assert isinstance(
        caught.value,
        InvalidTaskError | InvalidSettingError | AddTasksError | FastAPITasksUninitializedAppError,
    )
    assert outputs.with_secret() == []


async def test_settings_name_functions_and_do_not_print_them(outputs: Outputs) -> None:
    """A handler or an observer may be a partial or an object, with a token to ring somebody up."""
    handler = functools.partial(ring, code=SECRET)
    config = TaskConfig(on_error=handler)
    method = TaskConfig(on_error=Till(SECRET).charge)  # type: ignore[arg-type]
    async with Supervisor(config=config, observers=[Broken(SECRET)]) as supervisor:
        await over(supervisor.task(method).schedule(end_well))
        outputs.show(config, method, supervisor.settings, supervisor.settings.config)

    text = outputs.read()
    assert "on_error=ring" in text
    assert "on_error=Till.charge" in text
    assert "The observer Broken raised" in text
    assert outputs.with_secret() == []


async def test_a_broken_observer_does_not_make_the_event_visible(outputs: Outputs) -> None:
    """Not even if the log is broken too, and standard error has to do."""

    class BrokenLog(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise DeclinedError("disk full")

    broken = BrokenLog()
    logger = logging.getLogger("fastapi_tasks")
    logger.addFilter(broken)
    try:
        async with Supervisor(observers=[Broken(SECRET)]) as supervisor:
            await over(*schedule(supervisor, decline))
    finally:
        logger.removeFilter(broken)

    assert "disk full" in outputs.read()
    assert outputs.with_secret() == []


@pytest.mark.parametrize(
    "new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_a_loop_that_is_closed_under_its_tasks_does_not_show_what_they_were_given(
    new_loop: Callable[[], asyncio.AbstractEventLoop], outputs: Outputs
) -> None:
    """Though Python complains of each of them, and the next start reports that they were lost."""
    supervisor = Supervisor(observers=[outputs.observe])

    def close_under(*, begin: bool) -> list[Task]:
        loop = new_loop()
        loop.set_exception_handler(outputs.handle_context)
        loop.set_debug(True)
        loop.run_until_complete(supervisor.start())
        tasks = schedule(supervisor, wait_for_ever, COROUTINES)
        if begin:
            loop.run_until_complete(begun(*tasks))
        loop.close()
        return tasks

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tasks = close_under(begin=True) + close_under(begin=False)
        anyio.run(supervisor.start)  # which gives up what the loops before have left
        for lost in tasks:
            outputs.show_task(lost)
            assert lost.status == "cancelled"
        del lost, tasks
        gc.collect()

    for warning in warned:
        outputs.show(warning.message, warning)
    text = outputs.read()
    assert "Task was destroyed but it is pending" in text
    assert "was never awaited" in text
    assert "the event loop was closed before the app was shut down" in text
    assert outputs.with_secret() == []


# Requests


def _app_of(outputs: Outputs) -> FastAPI:
    app = FastAPI(debug=True)
    add_tasks(app, observers=[outputs.observe])

    def schedule_everywhere(tasks: TasksScheduler, run_if: RunIf) -> None:
        schedule(tasks, end_well)
        schedule(tasks.after_route.task(run_if=run_if), end_well)
        schedule(tasks.after_response.task(run_if=run_if), decline)

    @app.get("/returns")
    async def returns(connection: Request, tasks: Tasks) -> str:
        till = Till(SECRET)
        schedule_everywhere(tasks, "success")
        outputs.show(connection.scope, tasks, tasks.after_route)
        outputs.show_surroundings()
        return type(till).__name__

    @app.get("/refuses")
    async def refuses(tasks: Tasks) -> None:
        schedule_everywhere(tasks, "error")
        raise HTTPException(409, "no")

    @app.get("/raises")
    async def raises(tasks: Tasks) -> None:
        till = Till(SECRET)
        schedule_everywhere(tasks, "success")
        raise DeclinedError(f"by {type(till).__name__}")

    @app.get("/raises-in-thread")
    def raises_in_thread(tasks: Tasks) -> None:
        till = Till(SECRET)
        schedule_everywhere(tasks, "always")
        raise DeclinedError(f"by {type(till).__name__}")

    @app.get("/mistypes")
    def mistypes(tasks: Tasks) -> None:
        tasks.task(functools.partial(take, SECRET))  # type: ignore[call-overload]

    return app


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/returns", 200),
        ("/returns?leave", 200),
        ("/refuses", 409),
        ("/raises", 500),
        ("/raises-in-thread", 500),
        ("/mistypes", 500),
        ("/openapi.json", 200),
        ("/docs", 200),
    ],
)
@pytest.mark.parametrize("accept", ["text/html", "application/json"])
async def test_no_response_has_what_a_task_was_given(
    path: str, status: int, accept: str, outputs: Outputs
) -> None:
    """Not even in debug mode, where FastAPI answers with the traceback of what was raised."""
    app = _app_of(outputs)

    async def on_send(message: Message) -> None:
        outputs.show(message)
        if path.endswith("?leave"):
            raise OSError("broken pipe")

    async with lifespan(app):
        with outputs.of_the_loop():
            try:
                exchange = await request(app, path, headers={"accept": accept}, on_send=on_send)
            except (OSError, DeclinedError, InvalidSettingError) as error:
                outputs.show(error)
            else:
                assert exchange.status == status
            await over(*get_supervisor(app).running)
    outputs.show(*app.routes, *app.user_middleware, app.state, get_supervisor(app).settings)

    assert f"'status': {status}" in outputs.read()
    assert outputs.with_secret() == []


async def test_a_response_that_is_not_valid_is_not_shown_by_us(outputs: Outputs) -> None:
    """FastAPI's error has the value in its text; what we say of it is that the request failed."""
    app = FastAPI()
    add_tasks(app, observers=[outputs.observe])

    @app.get("/")
    async def endpoint(tasks: Tasks) -> int:
        schedule(tasks.after_response, end_well)
        return Till(SECRET)  # type: ignore[return-value]

    async with lifespan(app):
        with pytest.raises(ResponseValidationError) as caught:
            await request(app, "/")

    assert SECRET in str(caught.value)
    assert "the request failed" in outputs.read()
    assert outputs.with_secret() == []


# What is up to others


async def test_what_an_exception_says_is_up_to_those_who_raise_it(outputs: Outputs) -> None:
    """Its text is a part of the record: whoever puts an argument into it, publishes that."""

    async def pay(card: str) -> None:
        raise DeclinedError(f"{card} was declined")

    async with Supervisor() as supervisor:
        await over(supervisor.schedule(pay, SECRET))

    (line,) = {line for line in outputs.with_secret() if not line.startswith("{")}
    assert line.endswith("DeclinedError: hunter2 was declined")


async def test_those_who_are_given_a_task_can_look(outputs: Outputs) -> None:
    """A handler needs the arguments; so they are there, for a program and not for a reader."""
    async with Supervisor(observers=[outputs.observe]) as supervisor:
        given = supervisor.schedule(functools.partial(take, SECRET), Till(SECRET), code=SECRET)

    assert given.args == (Till(SECRET),)
    assert given.kwargs == {"code": SECRET}
    assert outputs.with_secret() == []


FORGED = "export\nERROR Task charge (5c1f09ab-7) failed\r\x1b[2J\u2028\u202e"


async def test_a_name_cannot_forge_a_line_of_the_log(outputs: Outputs) -> None:
    """It may be made from what a client has sent: what would end a line is shown escaped."""
    messages: list[str] = []
    outputs.addFilter(lambda record: messages.append(record.getMessage()) or True)
    texts: list[str] = []
    async with Supervisor() as supervisor:
        named = supervisor.task(name=FORGED)
        tasks = [named.schedule(fate) for fate in (end_well, wait_for_ever)]
        tasks.append(named.task(on_error=ring).schedule(decline))
        await begun(*tasks)
        texts += [str(error) for error in (TaskNotFinishedError(tasks[1]),)]
    tasks.append(named.schedule(end_well))
    for each in tasks:
        texts += [repr(each), each.name, str(TaskCancelledError(each))]
    texts += [str(WrongEventLoopError(tasks[0])), str(TaskFailedError(tasks[0], SystemExit()))]

    texts += [message for message in messages if "export" in message]
    assert {"on_error", "Shutdown:"} < {message.split(" ", 1)[0] for message in messages}
    assert len(texts) > 15
    assert [text for text in texts if not text.isprintable()] == []


# A real server


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_server_says_nothing_of_what_its_tasks_were_given(loop: str) -> None:
    """However much it says: at its most talkative, with asyncio's debug mode on."""
    with serve("private:app", "--loop", loop, "--log-level", "trace") as server:
        for path in ("/well", "/badly", "/raises", "/slowly"):
            server.get(path)
        end = server.stop()

    lines = [*end.said, *end.log]
    for fate in ("failed in attempt 1", "was dropped", "was cancelled", "Executing <"):
        assert any(fate in line for line in lines), fate
    assert [line for line in lines if SECRET in line] == []

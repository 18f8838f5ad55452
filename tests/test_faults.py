"""Faults on purpose: whatever goes wrong in or around a task, it goes wrong there and nowhere else.

What a failed task touches at all is in ``test_failures.py``; here are the odd ways to fail.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from fastapi import FastAPI
from starlette.types import Message

from fastapi_tasks import (
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    Tasks,
    TaskStatus,
    add_tasks,
    current_task,
    get_supervisor,
)

from . import asgi
from .clocks import Backend
from .conftest import ASYNCIO_BACKENDS, BACKENDS
from .recording import Observed, idle, ours
from .servers import PATIENCE


class StageError(Exception):
    """What goes wrong on this module's stage."""


async def stumble() -> None:
    """Fail."""
    raise StageError("the rope was wet")


def stumble_in_thread() -> None:
    """Fail in a thread."""
    raise StageError("the ladder was wet")


async def juggle(balls: int = 3) -> int:
    """Succeed, a bit later."""
    await anyio.lowlevel.checkpoint()
    return balls


async def stay() -> None:
    """Run until somebody cancels it."""
    await anyio.sleep_forever()


async def check_that_it_works(supervisor: Supervisor) -> None:
    """Fail unless a supervisor still runs tasks."""
    with anyio.fail_after(PATIENCE):
        assert await supervisor.schedule(juggle).wait() == 3
    await idle(supervisor)


async def raise_stray_cancellation(*args: object) -> None:
    """Let a cancellation out of the scope that it belongs to, which has been over for long."""
    stray: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class() as cancelled:
            stray.append(cancelled)
    raise stray.pop()


def refuse(*args: object) -> Any:
    """Be a method that fails."""
    raise OSError("not by me")


# Errors of every kind


@dataclass(frozen=True)
class Frozen(Exception):  # noqa: N818 - its name says what is odd
    """An exception on which nothing can be set, not even its traceback."""

    act: str = "clown"


@dataclass
class Unhashable(Exception):  # noqa: N818
    """An exception with the equality of its fields."""

    act: str = "clown"


class Unprintable(Exception):  # noqa: N818
    """An exception that cannot be shown."""

    __str__ = __repr__ = refuse


class Unrepeatable(Exception):  # noqa: N818
    """An exception that nobody can make a copy of."""

    def __init__(self, *, act: str, seat: int) -> None:
        super().__init__()
        self.act, self.seat = act, seat


class Empty(Exception):  # noqa: N818
    """An exception that is false."""

    def __len__(self) -> int:
        return 0


class Incomparable(Exception):  # noqa: N818
    """An exception that cannot be compared."""

    __eq__ = refuse
    __hash__ = None  # type: ignore[assignment]


ODD_ERRORS: list[Any] = [
    pytest.param(Frozen, id="frozen"),
    pytest.param(Unhashable, id="unhashable"),
    pytest.param(Unprintable, id="unprintable"),
    pytest.param(functools.partial(Unrepeatable, act="clown", seat=5), id="unrepeatable"),
    pytest.param(Empty, id="false"),
    pytest.param(Incomparable, id="incomparable"),
]


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("make_error", ODD_ERRORS)
async def test_an_odd_exception_is_raised_as_it_is(
    make_error: Callable[[], Exception], in_thread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of what exceptions may redefine is in the way of the record and of who waits."""
    error = make_error()
    handled: list[Exception] = []

    def fall() -> None:
        raise error

    async def fall_soon() -> None:
        fall()

    async with Supervisor() as supervisor:
        config = TaskConfig(on_error=lambda task, error: handled.append(error))
        task = supervisor.task(config).schedule(fall if in_thread else fall_soon)
        await idle(supervisor)
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                await task.wait()
            assert caught.value is error
        await check_that_it_works(supervisor)

    (record,) = ours(caplog)
    assert "in fall" in caplog.text
    assert record.exc_info is not None
    assert [each is error for each in (task.exception(), record.exc_info[1], *handled)] == [
        True
    ] * 3


class Indivisible(BaseExceptionGroup[BaseException]):
    """A group that cannot say what a part of it would be."""

    derive = refuse


async def test_a_group_that_cannot_be_split_is_a_failure_like_any_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it is made of is looked at without its help."""

    async def regroup() -> None:
        try:
            await stay()
        except BaseException as error:
            raise Indivisible("troupe", [error, StageError()]) from None

    async with Supervisor() as supervisor:
        task = supervisor.schedule(regroup)
        await task.started.wait()
        task.cancel()
        await idle(supervisor)
        assert isinstance(task.exception(), Indivisible)
        await check_that_it_works(supervisor)

    assert [record.levelno for record in ours(caplog)] == [logging.ERROR]


async def test_a_cancellation_that_has_left_its_scope_is_nobodys_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loop's own cancellation, which nobody asked a supervisor for, is a warning."""
    handled: list[Exception] = []
    config = TaskConfig(on_error=lambda task, error: handled.append(error))
    async with Supervisor(config=config) as supervisor:
        task = supervisor.schedule(raise_stray_cancellation)
        await idle(supervisor)
        assert (task.status, await task.wait()) == (TaskStatus.CANCELLED, None)
        await check_that_it_works(supervisor)

    assert [record.levelno for record in ours(caplog)] == [logging.WARNING]
    assert handled == []


@pytest.mark.parametrize("function", [stumble, stumble_in_thread])
async def test_a_thousand_failures_at_once_are_a_thousand_records(
    function: Callable[[], Any], observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has its own, each has its handler called once, and those in between go on."""
    handled: list[Task] = []

    async def handle(task: Task, error: Exception) -> None:
        await anyio.lowlevel.checkpoint()
        handled.append(task)

    bad, good = [], []
    async with Supervisor(config=TaskConfig(on_error=handle), observers=[observed]) as supervisor:
        for number in range(1000):
            bad.append(supervisor.schedule(function))
            good.append(supervisor.schedule(juggle, number))
        for task in (*good, *bad):  # to look at all of them in each turn takes its time
            with suppress(StageError):
                await task.wait()
        await idle(supervisor)

    assert [task.result() for task in good] == list(range(1000))
    assert {task.status for task in bad} == {TaskStatus.FAILED}
    records = ours(caplog)
    assert len(records) == len(handled) == len(bad) == 1000
    assert {vars(record)["task_id"] for record in records} == {task.id for task in bad}
    assert set(handled) == set(bad)
    assert observed.kinds().count(TaskEventKind.FAILED) == 1000


# Calls and results of every kind


class Refusing:
    """A callable that already fails when it is called, before there is anything to await."""

    def __call__(self) -> Awaitable[None]:
        raise StageError("not today")


class NotReally:
    """An awaitable that cannot be awaited."""

    def __await__(self) -> Generator[Any, Any, None]:
        return 5  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        pytest.param(Refusing(), StageError, id="call"),
        pytest.param(functools.partial(juggle, 1, 2, 3), TypeError, id="arguments"),
        pytest.param(NotReally, TypeError, id="await"),
    ],
)
async def test_a_call_that_fails_before_it_is_awaited_is_the_tasks_failure(
    function: Callable[[], Any], error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever part of running a function fails, schedule() has returned a task by then."""
    handled: list[Exception] = []
    config = TaskConfig(on_error=lambda task, error: handled.append(error))
    async with Supervisor(config=config) as supervisor:
        task = supervisor.schedule(function)
        await idle(supervisor)
        await check_that_it_works(supervisor)

    assert [type(each) for each in (task.exception(), *handled)] == [error] * 2
    assert len(ours(caplog)) == 1


class Spiteful:
    """A result that can be neither shown nor compared nor tested."""

    __repr__ = __eq__ = __bool__ = refuse
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_spiteful_result_is_handed_over_unseen(
    in_thread: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody but its receiver looks at it, in debug records neither."""
    caplog.set_level(logging.DEBUG)
    result = Spiteful()

    def give() -> Spiteful:
        return result

    async def give_soon() -> Spiteful:
        return result

    async with Supervisor() as supervisor:
        task = supervisor.schedule(give if in_thread else give_soon)
        assert await task.wait() is result
        assert task.result() is result

    assert {record.levelno for record in ours(caplog)} == {logging.DEBUG, logging.INFO}


# Tasks that cancel


async def test_a_task_that_cancels_itself_ends_at_its_next_await(observed: Observed) -> None:
    """Or returns, if there is none; that is up to it."""
    steps: list[str] = []

    async def bow(*, and_leave: bool) -> str:
        assert current_task().cancel()
        steps.append("bowed")
        if not and_leave:
            await stay()
        return "left"

    async with Supervisor(observers=[observed]) as supervisor:
        cancelled = supervisor.schedule(bow, and_leave=False)
        returned = supervisor.schedule(bow, and_leave=True)
        await idle(supervisor)
        await check_that_it_works(supervisor)

    assert steps == ["bowed"] * 2
    assert (cancelled.status, returned.result()) == (TaskStatus.CANCELLED, "left")
    assert observed.kinds(cancelled)[-1] == TaskEventKind.CANCELLED


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_task_that_cancels_itself_and_fails_has_its_handler(is_async: bool) -> None:
    """The cancellation has not been delivered when the task ends, and does not reach further."""
    handled: list[Exception] = []

    def note(task: Task, error: Exception) -> None:
        handled.append(error)

    async def note_soon(task: Task, error: Exception) -> None:
        await anyio.lowlevel.checkpoint()
        handled.append(error)

    async def bow_and_stumble() -> None:
        current_task().cancel()
        await stumble()

    config = TaskConfig(on_error=note_soon if is_async else note)
    async with Supervisor(config=config) as supervisor:
        task = supervisor.schedule(bow_and_stumble)
        await idle(supervisor)

    assert handled == [task.exception()]


@pytest.mark.parametrize("anyio_backend", ASYNCIO_BACKENDS)
async def test_a_second_cancellation_is_not_taken_for_the_first() -> None:
    """One that comes while the first is on its way to nobody is the error handler's."""
    interrupted: list[BaseException] = []

    async def wait_for_ever(task: Task, error: Exception) -> None:
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError as cancellation:
            interrupted.append(cancellation)
            raise

    async def bow_and_be_pushed() -> None:
        pushed = asyncio.current_task()
        assert pushed is not None
        current_task().cancel()
        asyncio.get_running_loop().call_soon(pushed.cancel)
        await stumble()

    async with Supervisor(config=TaskConfig(on_error=wait_for_ever)) as supervisor:
        supervisor.schedule(bow_and_be_pushed)
        await idle(supervisor)

    assert len(interrupted) == 1


async def test_a_task_may_cancel_all_others() -> None:
    """It goes on itself, and so does the supervisor."""

    async def clear_the_ring() -> int:
        me = current_task()
        others = [task for task in supervisor.running if task is not me]
        for task in others:
            task.cancel()
        await anyio.lowlevel.checkpoint()
        return len(others)

    async with Supervisor(config=TaskConfig(shield=True)) as supervisor:
        tasks = [supervisor.schedule(stay) for _ in range(50)]
        last = supervisor.schedule(clear_the_ring)
        await idle(supervisor)
        await check_that_it_works(supervisor)

    assert last.result() == 50
    assert {task.status for task in tasks} == {TaskStatus.CANCELLED}


# Error handlers


async def test_a_handler_that_never_ends_is_given_up_at_the_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is shielded with its task, and bounded with it, cancelled or not."""
    gate, entered = anyio.Event(), anyio.Event()

    async def hang(task: Task, error: Exception) -> None:
        entered.set()
        while not gate.is_set():
            with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                await gate.wait()

    config = TaskConfig(shield=True, on_error=hang)
    supervisor = Supervisor(config=config, shutdown_timeout=0.01)
    await supervisor.start()
    task = supervisor.schedule(stumble)
    await entered.wait()
    with anyio.fail_after(PATIENCE):
        report = await supervisor.drain()

    assert report.abandoned == (task,)
    assert task.status is TaskStatus.FAILED
    assert [record.getMessage().partition(" ")[0] for record in ours(caplog)] == [
        "Task",
        "Shutdown:",  # cancelling
        "Shutdown:",  # abandoning
    ]
    gate.set()
    await supervisor.start()
    await check_that_it_works(supervisor)
    await supervisor.drain()


async def test_a_handler_that_is_cancelled_from_within_has_failed(observed: Observed) -> None:
    """It has not been called in vain: that it did not end well is told."""
    config = TaskConfig(on_error=raise_stray_cancellation)
    async with Supervisor(config=config, observers=[observed]) as supervisor:
        task = supervisor.schedule(stumble)
        await idle(supervisor)
        await check_that_it_works(supervisor)

    assert isinstance(task.exception(), StageError)
    assert observed.kinds(task) == ["scheduled", "started", "failed", "handler_failed"]
    assert isinstance(observed.events[3].error, anyio.get_cancelled_exc_class())


async def test_a_handler_may_schedule_tasks() -> None:
    """In a drain too: a shielded task's handler has shielded tasks run, and they are waited for."""
    cleaned: list[str] = []

    async def clean(what: str) -> None:
        await anyio.lowlevel.checkpoint()
        cleaned.append(what)

    async def call_cleaners(task: Task, error: Exception) -> None:
        for what in ("ring", "stands"):
            get_supervisor().task(shield=True).schedule(clean, what)

    async with Supervisor() as supervisor:
        place = supervisor.task(shield=True, on_error=call_cleaners)
        place.schedule(stumble)
        await idle(supervisor)
        assert sorted(cleaned) == ["ring", "stands"]
        place.schedule(stumble)

    assert sorted(cleaned) == ["ring", "ring", "stands", "stands"]


# Logs and observers


class Jammed:
    """A stream that takes nothing."""

    def write(self, text: str) -> None:
        """Refuse."""
        raise OSError("disk full")

    def flush(self) -> None:
        """Have nothing to do."""


@contextmanager
def jammed_log() -> Iterator[None]:
    """Let the package's log have a handler whose every record fails, as logging does it."""
    logger = logging.getLogger("fastapi_tasks")
    handler = logging.StreamHandler(Jammed())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("raise_exceptions", [True, False])
async def test_a_log_whose_stream_fails_touches_nothing(
    raise_exceptions: bool,
    observed: Observed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logging says so on standard error, unless it is told not to; everything else goes on."""
    monkeypatch.setattr(logging, "raiseExceptions", raise_exceptions)
    with jammed_log():
        async with Supervisor(observers=[observed]) as supervisor:
            bad = supervisor.schedule(stumble)
            await idle(supervisor)
            await check_that_it_works(supervisor)

    assert observed.kinds(bad) == ["scheduled", "started", "failed"]
    assert ("Logging error" in capsys.readouterr().err) is raise_exceptions


async def test_an_observer_may_schedule_tasks() -> None:
    """One that keeps books in tasks of their own sees those too, and has to tell them apart."""
    booked: list[str] = []

    async def book(what: str) -> None:
        booked.append(what)

    def observe(event: TaskEvent) -> None:
        for task in event.tasks:
            if task.name != "book":
                supervisor.task(name="book", shield=True).schedule(book, event.kind)

    async with Supervisor(observers=[observe]) as supervisor:
        good, bad = supervisor.schedule(juggle), supervisor.schedule(stumble)
        await idle(supervisor)
        assert (good.result(), type(bad.exception())) == (3, StageError)
        assert sorted(booked) == sorted(
            ["scheduled", "started", "finished", "scheduled", "started", "failed"]
        )
        booked.clear()
        supervisor.schedule(stay)

    assert set(booked) == {"scheduled", "drain_started", "drain_cancelling", "cancelled"}


async def test_an_observer_that_blocks_holds_up_the_loop_and_no_thread() -> None:
    """It must not, but no lock is held meanwhile: threads schedule, and the loop catches up."""
    asked, scheduled = threading.Event(), threading.Event()
    at_work = anyio.Event()
    others: list[Task] = []

    def work() -> None:
        anyio.from_thread.run_sync(at_work.set)
        assert asked.wait(PATIENCE)
        others.append(get_supervisor().schedule(juggle))
        scheduled.set()

    def observe(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.FAILED:
            asked.set()
            assert scheduled.wait(PATIENCE)

    async with Supervisor(observers=[observe]) as supervisor:
        working = supervisor.schedule(work)
        await at_work.wait()
        supervisor.schedule(stumble)
        await idle(supervisor)
        (other,) = others
        assert await other.wait() == 3
        assert working.status is TaskStatus.SUCCEEDED


# The app's lifespan and its event loops


class Server:
    """A server's side of the lifespan, which breaks down at one of its messages."""

    def __init__(self, breaks_at: str = "") -> None:
        self.breaks_at = breaks_at
        self.started = anyio.Event()
        self.shut_down = anyio.Event()
        self.sent: list[str] = []
        self._received = 0

    async def receive(self) -> Message:
        """Start up, and shut down when that is asked for."""
        self._received += 1
        message = "startup" if self._received == 1 else "shutdown"
        if self._received > 1:
            await self.shut_down.wait()
        self._break_at(message)
        return {"type": f"lifespan.{message}"}

    async def send(self, message: Message) -> None:
        """Note a message."""
        what = message["type"].removeprefix("lifespan.")
        self._break_at(what)
        self.sent.append(what)
        if what == "startup.complete":
            self.started.set()

    def _break_at(self, message: str) -> None:
        if message == self.breaks_at:
            raise ConnectionError(message)

    async def serve(self, app: FastAPI) -> None:
        """Run an app's lifespan."""
        await app({"type": "lifespan", "state": {}}, self.receive, self.send)


def show(lifespan: Any = None, **settings: Any) -> FastAPI:
    """Return an app with tasks of all three moments."""
    app = FastAPI(lifespan=lifespan)
    add_tasks(app, **settings)

    @app.get("/")
    async def perform(tasks: Tasks) -> str:
        tasks.schedule(juggle, 1)
        tasks.after_route.schedule(juggle, 2)
        tasks.after_response.schedule(juggle, 3)
        return "applause"

    return app


@pytest.mark.parametrize(
    "message", ["startup", "startup.complete", "shutdown", "shutdown.complete"]
)
async def test_a_server_that_breaks_down_gets_its_own_error(
    message: str, observed: Observed
) -> None:
    """Wherever it does; the tasks are over, and the app can be served by another one."""
    app = show(observers=[observed])
    supervisor = get_supervisor(app)
    server = Server(breaks_at=message)
    server.shut_down.set()
    with pytest.raises(ConnectionError, match=f"^{message}$"):
        await server.serve(app)

    assert not supervisor.is_running
    async with asgi.lifespan(app):
        observed.events.clear()
        assert (await asgi.request(app, "/")).json() == "applause"
        await observed.all_over()
        assert observed.kinds().count(TaskEventKind.FINISHED) == 3


@pytest.mark.parametrize("fails_at", ["start-up", "shutdown"])
async def test_an_app_whose_lifespan_fails_can_be_started_again(
    fails_at: str, observed: Observed
) -> None:
    """Its own error comes out, its tasks are over, and nothing is left for the next time."""
    works = False

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = get_supervisor(app).schedule(stay)
        await running.started.wait()
        if fails_at == "start-up" and not works:
            raise StageError(fails_at)
        yield
        assert running.status is TaskStatus.CANCELLED
        if not works:
            raise StageError(fails_at)

    app = show(lifespan, observers=[observed])
    server = Server()
    server.shut_down.set()
    with pytest.raises(StageError, match=fails_at):
        await server.serve(app)
    assert server.sent[-1] == f"{fails_at.replace('-', '')}.failed"
    assert observed.kinds()[-1] == TaskEventKind.DRAIN_FINISHED
    assert {task.status for event in observed.events for task in event.tasks} == {
        TaskStatus.CANCELLED
    }

    works = True
    async with asgi.lifespan(app):
        assert (await asgi.request(app, "/")).json() == "applause"


async def serve_once(app: FastAPI, observed: Observed) -> list[TaskEventKind]:
    """Run an app for one request, and return how its tasks ended."""
    observed.events.clear()
    async with asgi.lifespan(app):
        assert (await asgi.request(app, "/")).json() == "applause"
        await observed.all_over()
    return [kind for kind in observed.kinds() if kind is TaskEventKind.FINISHED]


@pytest.mark.parametrize("second", BACKENDS)
@pytest.mark.parametrize("first", BACKENDS)
def test_an_app_can_be_served_on_one_event_loop_after_the_other(
    first: Backend, second: Backend, observed: Observed
) -> None:
    """As tests do, each with a loop of its own."""
    app = show(observers=[observed])
    for backend, options in (first, second):
        finished = anyio.run(serve_once, app, observed, backend=backend, backend_options=options)
        assert len(finished) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_app_whose_loop_was_closed_can_be_started_on_another_one(
    backend: Backend, observed: Observed
) -> None:
    """What was left of the first run is told, and does not come back to disturb the second."""
    app = show(observers=[observed])
    supervisor = get_supervisor(app)
    server = Server()
    loop = asyncio.new_event_loop()
    serving = [loop.create_task(server.serve(app))]
    loop.run_until_complete(server.started.wait())
    lost = [supervisor.schedule(stay)]
    loop.run_until_complete(lost[0].started.wait())
    loop.close()

    async def serve_and_collect() -> None:
        async with asgi.lifespan(app):
            assert lost[0].status is TaskStatus.CANCELLED
            serving.clear()
            gc.collect()  # here at the latest the coroutine of the first run is thrown away
            assert supervisor.is_running
            assert (await asgi.request(app, "/")).json() == "applause"
            await observed.all_over()

    del loop, server
    anyio.run(serve_and_collect, backend=backend[0], backend_options=backend[1])

    assert observed.kinds(lost[0])[-1] == TaskEventKind.DROPPED
    assert observed.kinds().count(TaskEventKind.FINISHED) == 3
    assert not supervisor.is_running
    lost.clear()
    observed.events.clear()
    gc.collect()  # what asyncio says of its lost task is not for the log of another test

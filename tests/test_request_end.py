"""What a task can read of how its request ended."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.types import Message

from fastapi_tasks import (
    FastAPITasksUninitializedAppError,
    Supervisor,
    Task,
    Tasks,
    TasksBatch,
    TasksRoute,
    TasksScheduler,
    current_task,
    get_supervisor,
    get_tasks,
)

from .asgi import Lifespan, lifespan, request
from .endpoints import Kind, both_kinds
from .load import silence
from .recording import Observed, idle, let_others_run

End = tuple[int | None, type[BaseException] | None]
"""A status, and the type of an error."""

RUN_IF: tuple[Literal["success", "error", "always"], ...] = ("success", "error", "always")

SUCCESS, ERROR = {"success", "always"}, {"error", "always"}


class MisprintError(Exception):
    """What goes wrong in this module's books."""


def end() -> End:
    """Return what the current task sees."""
    task = current_task()
    # What breaks off a stream comes in a group from older Starlettes.
    error, *_ = getattr(task.route_error, "exceptions", (task.route_error,))
    return task.response_status, None if error is None else type(error)


class Seen(dict[str, End]):
    """What tasks have seen when they began, by the name of each."""

    def schedule(self, tasks: TasksScheduler) -> None:
        """Schedule a task for each outcome of both batches."""
        for name, batch in (("route", tasks.after_route), ("response", tasks.after_response)):
            for run_if in RUN_IF:
                batch.task(run_if=run_if).schedule(self.look, f"{name}, {run_if}")

    async def look(self, name: str) -> None:
        """Be a task that looks."""
        self[name] = end()

    def look_in_thread(self, name: str) -> None:
        """Be a task that looks from a thread."""
        self[name] = end()

    def of(self, batch: str) -> dict[str, End]:
        """Return what the tasks of one batch have seen, by their ``run_if``."""
        return {
            name.partition(", ")[2]: seen for name, seen in self.items() if name.startswith(batch)
        }


async def forgotten(supervisor: Supervisor) -> None:
    """Wait until nothing runs, and the event loop has let go of what did."""
    await idle(supervisor)
    await let_others_run()


@pytest.fixture
def seen() -> Seen:
    """What tasks have seen."""
    return Seen()


@pytest.fixture(params=[TasksRoute, APIRoute], ids=lambda route: route.__name__)
def router(request: pytest.FixtureRequest) -> APIRouter:
    """A router of either kind; it is to be included when its routes are there."""
    return APIRouter(route_class=request.param)


# Every way in which a request ends

Schedule = Callable[[TasksScheduler], object]
Add = Callable[[APIRouter, Kind, Schedule], None]


@dataclass
class Way:
    """How a request ends."""

    add: Add
    """Adds ``GET /``, which schedules something and ends like this."""
    route: set[str]
    """The ``run_if`` of what then starts of ``after_route``."""
    response: set[str]
    """The same of ``after_response``."""
    end: End
    """What ``after_response`` sees."""
    client: Callable[[Message], Any] | None = None


def returns_a_404(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Say no, which is a success."""

    @router.get("/")
    @kind
    def endpoint(tasks: Tasks) -> Response:
        schedule(tasks)
        return Response(status_code=404)


def raises_an_http_exception(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Say no, which is an error."""

    @router.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        schedule(tasks)
        raise HTTPException(404)


def raises(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Raise what nobody handles."""

    @router.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        schedule(tasks)
        raise MisprintError


def returns_what_is_not_valid(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Return what the response's model refuses."""

    @router.get("/", response_model=int)
    @kind
    def endpoint(tasks: Tasks) -> str:
        schedule(tasks)
        return "three"


def has_a_dependency_that_fails_on_exit(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Return, before what is closed with the function fails."""

    async def dependency() -> AsyncIterator[None]:
        yield
        raise HTTPException(409)

    @router.get("/", dependencies=[Depends(dependency, scope="function")])
    @kind
    def endpoint(tasks: Tasks) -> None:
        schedule(tasks)


def has_a_dependency_that_translates(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Raise what a dependency makes an HTTPException of."""

    async def translate() -> AsyncIterator[None]:
        try:
            yield
        except MisprintError:
            raise HTTPException(410) from None

    translated = Depends(translate)

    @router.get("/")
    @kind
    def endpoint(tasks: Tasks, nothing: Any = translated) -> None:
        schedule(tasks)
        raise MisprintError


def is_not_valid(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Never reach the endpoint, after a dependency has scheduled."""

    @kind
    def ask(tasks: Tasks) -> None:
        schedule(tasks)

    @router.get("/", dependencies=[Depends(ask)])
    async def endpoint(page: int) -> None:
        """Never be reached."""


def streams_and_raises(router: APIRouter, kind: Kind, schedule: Schedule) -> None:
    """Break off a response."""

    async def pages() -> AsyncIterator[str]:
        yield "one"
        raise MisprintError

    @router.get("/")
    @kind
    def endpoint(tasks: Tasks) -> Response:
        schedule(tasks)
        return StreamingResponse(pages())


async def leave(message: Message) -> None:
    """Be a client that has gone."""
    raise OSError("broken pipe")


WAYS = [
    Way(returns_a_404, SUCCESS, SUCCESS, (404, None)),
    Way(returns_a_404, SUCCESS, SUCCESS, (404, None), client=leave),
    Way(raises_an_http_exception, ERROR, ERROR, (404, HTTPException)),
    Way(raises, ERROR, ERROR, (None, MisprintError)),
    Way(returns_what_is_not_valid, SUCCESS, ERROR, (None, ResponseValidationError)),
    Way(has_a_dependency_that_fails_on_exit, SUCCESS, ERROR, (409, HTTPException)),
    Way(has_a_dependency_that_translates, ERROR, ERROR, (410, HTTPException)),
    Way(is_not_valid, ERROR, ERROR, (422, RequestValidationError)),
    Way(streams_and_raises, SUCCESS, ERROR, (200, MisprintError)),
]


@both_kinds
@pytest.mark.parametrize(
    "way", [pytest.param(w, id=w.add.__name__ + ("-alone" if w.client else "")) for w in WAYS]
)
async def test_a_task_reads_how_its_request_ended(
    way: Way, kind: Kind, router: APIRouter, app: FastAPI, observed: Observed, seen: Seen
) -> None:
    """Whichever tasks start: the response's status, and what went wrong."""
    way.add(router, kind, seen.schedule)
    app.include_router(router)

    async with lifespan(app):
        with suppress(MisprintError, ResponseValidationError, OSError, ExceptionGroup):
            await request(app, "/", **({"on_send": way.client} if way.client else {}))
        await observed.all_over()

    assert seen.of("response") == dict.fromkeys(way.response, way.end)
    assert set(seen.of("route")) == way.route


@both_kinds
async def test_an_after_route_task_reads_the_error_and_no_status_yet(
    kind: Kind, app: FastAPI, observed: Observed
) -> None:
    """The response comes later: it is known to who is still there."""
    ends: list[End] = []
    sent = anyio.Event()

    async def look_twice() -> None:
        ends.append(end())
        await sent.wait()
        ends.append(end())

    async def answer(request: Request, error: Exception) -> Response:
        await let_others_run()
        return PlainTextResponse("misprint", 400)

    app.add_exception_handler(MisprintError, answer)

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        tasks.after_route.task(run_if="error").schedule(look_twice)
        raise MisprintError

    async with lifespan(app):
        await request(app, "/")
        sent.set()
        await observed.all_over()

    assert ends == [(None, MisprintError), (400, MisprintError)]


# Other tasks


async def test_an_immediate_task_reads_the_end_when_it_is_there(
    router: APIRouter, app: FastAPI, observed: Observed
) -> None:
    """Until then it reads nothing, which is no error."""
    ends: list[End] = []
    over = anyio.Event()

    async def look_twice() -> None:
        ends.append(end())
        await over.wait()
        ends.append(end())

    @router.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(look_twice)
        await let_others_run()
        raise HTTPException(404)

    app.include_router(router)
    async with lifespan(app):
        await request(app, "/")
        over.set()
        await observed.all_over()

    assert ends == [(None, None), (404, HTTPException)]


async def test_configured_and_sync_tasks_and_error_handlers_read_the_end_too(
    app: FastAPI, seen: Seen
) -> None:
    """And so does a handler that runs the function again."""

    async def look_and_fail() -> None:
        seen[f"attempt {len(seen)}"] = end()
        raise MisprintError

    async def look_again(task: Task, error: Exception) -> None:
        seen["handler"] = end()
        with suppress(MisprintError):
            await task()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        batch = tasks.after_response.task(run_if="error")
        batch.schedule(seen.look_in_thread, "thread")
        batch.task(on_error=look_again).schedule(look_and_fail)
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")
        await idle(get_supervisor(app))

    assert set(seen.values()) == {(404, HTTPException)}
    assert {"thread", "handler"} < set(seen)
    assert len([name for name in seen if name.startswith("attempt")]) == 2


async def test_the_supervisors_tasks_belong_to_no_request(
    app: FastAPI, observed: Observed, seen: Seen
) -> None:
    """Not even those that are scheduled in an endpoint, or in a task of a request."""

    async def go_on() -> None:
        get_supervisor().schedule(seen.look, "from a task")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.supervisor.schedule(seen.look, "from the endpoint")
        tasks.after_response.task(run_if="error").schedule(go_on)
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")
        await observed.all_over()
        await observed.all_over()  # what tasks have scheduled

    assert seen == {"from a task": (None, None), "from the endpoint": (None, None)}


async def test_each_request_has_an_end_of_its_own(
    app: FastAPI, observed: Observed, seen: Seen
) -> None:
    """Also if they are served at the same time."""
    arrived = [anyio.Event(), anyio.Event()]

    @app.get("/{number}")
    async def endpoint(number: int, tasks: Tasks) -> Response:
        tasks.after_response.schedule(seen.look, str(number))
        arrived[number].set()
        for each in arrived:
            await each.wait()
        return Response(status_code=200 + number)

    async with lifespan(app):
        async with anyio.create_task_group() as group:
            for number in range(2):
                group.start_soon(request, app, f"/{number}")
        await observed.all_over()

    assert seen == {"0": (200, None), "1": (201, None)}


class PatientRoute(TasksRoute):
    """A route that handles a request again if that has failed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that tries twice."""
        handler = super().get_route_handler()

        async def twice(request: Request) -> Response:
            with suppress(MisprintError):
                return await handler(request)
            await self.before_second_attempt()
            return await handler(request)

        return twice

    async def before_second_attempt(self) -> None:
        """Do nothing."""


async def test_each_attempt_at_a_request_has_an_end_of_its_own(
    app: FastAPI, observed: Observed, seen: Seen
) -> None:
    """The tasks of one that was made again never hear of the other."""
    router = APIRouter(route_class=PatientRoute)
    attempts: Iterator[int] = iter((1, 2))

    @router.get("/")
    async def endpoint(tasks: Tasks) -> None:
        attempt = next(attempts)
        tasks.after_response.task(run_if="always").schedule(seen.look, str(attempt))
        if attempt == 1:
            raise MisprintError

    app.include_router(router)
    async with lifespan(app):
        assert (await request(app, "/")).status == 200
        await observed.all_over()

    assert seen == {"1": (None, MisprintError), "2": (200, None)}


async def test_an_attempt_that_is_not_let_in_is_no_news_for_the_one_before(app: FastAPI) -> None:
    """What that one knows is over, and the app is shut down before the next."""
    served: list[Lifespan] = []
    kept: list[TasksScheduler] = []

    class SlowRoute(PatientRoute):
        async def before_second_attempt(self) -> None:
            await served[0].shutdown()

    async def apologize(request: Request, error: Exception) -> Response:
        return PlainTextResponse("closed", 503)

    app.add_exception_handler(FastAPITasksUninitializedAppError, apologize)
    router = APIRouter(route_class=SlowRoute)

    @router.get("/")
    async def endpoint(tasks: Tasks) -> None:
        kept.append(tasks)
        raise MisprintError

    app.include_router(router)
    async with lifespan(app) as running:
        served.append(running)
        assert (await request(app, "/")).status == 503

    task = kept[0].schedule(let_others_run)
    assert (task.response_status, task.route_error) == (None, None)


async def test_a_handler_that_asks_first_makes_tasks_that_know_the_status(
    app: FastAPI, observed: Observed, seen: Seen
) -> None:
    """It has the error itself. However often it asks, it gets the same scheduler."""

    async def answer(request: Request, error: Exception) -> Response:
        tasks = await get_tasks(request)
        assert await get_tasks(request) is tasks
        tasks.after_response.task(run_if="error").schedule(seen.look, "handler's")
        return PlainTextResponse("misprint", 400)

    app.add_exception_handler(MisprintError, answer)

    @app.get("/")
    async def endpoint() -> None:
        raise MisprintError

    async with lifespan(app):
        await request(app, "/")
        await observed.all_over()

    assert seen == {"handler's": (400, None)}


def test_a_websocket_has_no_status_but_errors(app: FastAPI, seen: Seen) -> None:
    """What leaves its handler is one, as it is for any request."""

    @app.websocket("/")
    async def endpoint(socket: WebSocket, tasks: Tasks) -> None:
        await socket.accept()
        tasks.after_response.task(run_if="always").schedule(seen.look, await socket.receive_text())
        if (await socket.receive_text()) == "misprint":
            raise MisprintError

    def talk(*texts: str) -> None:
        with client.websocket_connect("/") as socket:
            for text in texts:
                socket.send_text(text)

    with TestClient(app) as client:
        talk("returned", "goodbye")
        with pytest.raises(MisprintError):
            talk("failed", "misprint")
        assert client.portal is not None
        client.portal.call(idle, get_supervisor(app))

    assert seen == {"returned": (None, None), "failed": (None, MisprintError)}


# Nothing is kept


async def test_what_is_scheduled_after_the_end_reads_nothing(
    app: FastAPI, observed: Observed, seen: Seen
) -> None:
    """Who has kept the scheduler for so long, has not kept the error."""
    kept: list[TasksScheduler] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        kept.append(tasks)
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")
        (tasks,) = kept
        batches: tuple[TasksBatch, ...] = (tasks.after_route, tasks.after_response)
        tasks.schedule(seen.look, "now")
        for number, batch in enumerate(batches):
            batch.task(run_if="error").schedule(seen.look, str(number))
        await observed.all_over()

    assert seen == dict.fromkeys(["now", "0", "1"], (None, None))


async def look() -> None:
    """Be a task that looks at the error, and ends."""
    current_task()
    await anyio.lowlevel.checkpoint()


async def look_and_fail() -> None:
    """Be a task that has an error of its own."""
    raise ConnectionError


async def handle(task: Task, error: Exception) -> None:
    """Be an error handler that looks at the request's error, too."""
    await anyio.lowlevel.checkpoint()


def look_in_thread() -> None:
    """Be a task that has a thread."""


def immediate(tasks: TasksScheduler) -> Task:
    """Schedule what starts at once."""
    return tasks.schedule(look)


def started(tasks: TasksScheduler) -> Task:
    """Schedule what starts because of the error."""
    return tasks.after_response.task(run_if="error").schedule(look)


def dropped(tasks: TasksScheduler) -> Task:
    """Schedule what never starts because of the error."""
    return tasks.after_response.schedule(look)


def cancelled(tasks: TasksScheduler) -> Task:
    """Schedule what is cancelled before the error."""
    task = tasks.after_route.schedule(look)
    task.cancel()
    return task


def handled(tasks: TasksScheduler) -> Task:
    """Schedule what fails, and has an error handler."""
    return tasks.after_route.task(run_if="error", on_error=handle).schedule(look_and_fail)


def in_thread(tasks: TasksScheduler) -> Task:
    """Schedule what runs in a thread."""
    return tasks.after_response.task(run_if="always").schedule(look_in_thread)


def nothing(tasks: TasksScheduler) -> None:
    """Take tasks, and schedule none."""


async def answer_misprint(request: Request, error: Exception) -> Response:
    """Be an exception handler."""
    return PlainTextResponse("misprint", 400)


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "unanswered"])
@pytest.mark.parametrize(
    "schedule",
    [nothing, immediate, started, dropped, cancelled, handled, in_thread],
    ids=lambda schedule: schedule.__name__,
)
async def test_a_failed_request_leaves_nothing_for_the_garbage_collector(
    schedule: Callable[[TasksScheduler], Task | None],
    answered: bool,
    router: APIRouter,
    app: FastAPI,
) -> None:
    """The endpoint's frame has the task, the task knows the error, and that has the frame.

    Of errors that endpoints raise in threads, anyio makes a cycle by itself.
    """
    errors: list[weakref.ref[MisprintError]] = []
    if answered:
        app.add_exception_handler(MisprintError, answer_misprint)

    @router.get("/")
    async def endpoint(tasks: Tasks) -> None:
        task = schedule(tasks)
        error = MisprintError()
        errors.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error
            assert task is None or task.func in (look, look_and_fail, look_in_thread)

    app.include_router(router)
    with silence():
        async with lifespan(app):
            gc.collect()
            gc.disable()
            try:
                with suppress(MisprintError):
                    await request(app, "/")
                await forgotten(get_supervisor(app))
                (error,) = errors
                looks: list[bool] = []
                for _ in range(20):  # a worker thread lets go of its last call a moment later
                    await anyio.lowlevel.checkpoint()
                    looks.append(error() is None)
                assert any(looks)
            finally:
                gc.enable()


async def test_a_task_that_is_over_does_not_keep_the_error(app: FastAPI) -> None:
    """Whoever keeps a task for its result keeps nothing of its request."""
    kept: list[Task] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        kept.append(tasks.after_response.task(run_if="error").schedule(look))
        kept.append(tasks.after_response.schedule(look))
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")
        await forgotten(get_supervisor(app))

        assert [(task.response_status, task.route_error) for task in kept] == [(None, None)] * 2

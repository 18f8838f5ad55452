"""What happens to requests while as many tasks are live as ``max_tasks`` allows."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message

from fastapi_tasks import (
    FastAPITasksError,
    Supervisor,
    Task,
    TaskEvent,
    TaskEventKind,
    Tasks,
    TasksRoute,
    TooManyTasksError,
    add_tasks,
    get_supervisor,
    get_tasks,
)

from .asgi import Exchange, lifespan, request
from .recording import Observed, Timeline, idle, let_others_run, ours

PROBLEM = {
    "type": "about:blank",
    "title": "Service Unavailable",
    "status": 503,
    "detail": "The server is busy. Try again in a moment.",
}


def header(exchange: Exchange, name: str) -> str | None:
    """Return a header of the response."""
    headers = dict(exchange.sent[0]["headers"])
    value = headers.get(name.encode())
    return None if value is None else value.decode()


class Office:
    """An app whose tasks last until somebody opens the gate."""

    def __init__(self, max_tasks: int | None = 1, *, app: FastAPI | None = None) -> None:
        self.observed = Observed()
        self.gate = anyio.Event()
        self.served: list[str] = []
        self.app = FastAPI() if app is None else app
        add_tasks(self.app, observers=[self.observed], max_tasks=max_tasks)
        self.add_counter(self.app)

    def add_counter(self, app: FastAPI) -> None:
        """Let an app have endpoints with tasks and one without."""

        @app.post("/letters")
        async def post_letter(tasks: Tasks, count: int = 1) -> None:
            self.served.append("letter")
            for _ in range(count):
                tasks.schedule(self.carry)

        @app.get("/hours")
        async def hours() -> str:
            return "9 to 5"

    async def carry(self) -> None:
        """Be a task that lasts."""
        await self.gate.wait()

    async def post(self, count: int = 1, path: str = "/letters") -> Exchange:
        """Send a request whose endpoint schedules some tasks."""
        return await request(self.app, f"{path}?count={count}", method="POST")

    @property
    def supervisor(self) -> Supervisor:
        """The app's."""
        return get_supervisor(self.app)

    async def close(self) -> None:
        """Let all tasks end."""
        self.gate.set()
        await idle(self.supervisor)


# Refused, and let in again


async def test_a_request_beyond_the_limit_is_answered_with_503() -> None:
    """Before its endpoint runs; with a problem that says no more than it has to (RFC 9457)."""
    office = Office(max_tasks=2)
    async with lifespan(office.app):
        assert [(await office.post()).status for _ in range(2)] == [200, 200]
        refused = await office.post()
        await office.close()

    assert refused.status == 503
    assert header(refused, "retry-after") == "1"
    assert header(refused, "content-type") == "application/problem+json"
    assert refused.json() == PROBLEM
    assert office.served == ["letter"] * 2
    assert office.observed.kinds().count(TaskEventKind.SCHEDULED) == 2


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("route_class", [TasksRoute, APIRoute])
async def test_a_request_is_refused_on_every_route_and_for_every_method(
    route_class: type[APIRoute], method: str
) -> None:
    """It is the taking of Tasks that is refused, also by a dependency."""
    office = Office()
    router = APIRouter(route_class=route_class)

    def ask(tasks: Tasks) -> None:
        """Take tasks."""

    @router.api_route("/letters", methods=[method], dependencies=[Depends(ask)])
    async def count_letters() -> int:
        return len(office.served)

    office.app.include_router(router)
    async with lifespan(office.app):
        before = await request(office.app, "/letters", method=method)
        await office.post()
        refused = await request(office.app, "/letters", method=method)
        await office.close()

    assert (before.status, refused.status) == (200, 503)


async def test_who_takes_no_tasks_is_served_at_the_limit() -> None:
    """Health checks for example."""
    office = Office()
    async with lifespan(office.app):
        await office.post()
        assert (await request(office.app, "/hours")).json() == "9 to 5"
        await office.close()


async def test_a_request_is_let_in_when_a_task_has_ended() -> None:
    """In the very moment: whoever has waited for the task need not wait for the event loop too."""
    office = Office()
    async with lifespan(office.app):
        await office.post()
        assert (await office.post()).status == 503
        (task,) = office.supervisor.running
        office.gate.set()
        await task.wait()
        assert (await office.post()).status == 200
        await office.close()


@pytest.mark.parametrize("outcome", ["finished", "failed"])
async def test_a_task_does_not_count_from_the_moment_on_that_it_is_over(outcome: str) -> None:
    """The event loop still has it for a turn."""
    told: list[str] = []

    def look(event: TaskEvent) -> None:
        if event.kind == outcome:
            supervisor.require_room()
            told.append(event.kind)

    async def run() -> None:
        with pytest.raises(TooManyTasksError):
            supervisor.require_room()
        if outcome == "failed":
            raise ConnectionError

    supervisor = Supervisor(observers=[look], max_tasks=1)
    async with supervisor:
        with suppress(ConnectionError):
            await supervisor.schedule(run).wait()

    assert told == [outcome]


async def test_a_failed_task_counts_until_its_error_handler_is_over() -> None:
    """There is as much left to do as there was before."""
    failed, gate = anyio.Event(), anyio.Event()

    async def fail() -> None:
        raise ConnectionError

    async def handle(task: Task, error: Exception) -> None:
        failed.set()
        await gate.wait()

    async with Supervisor(max_tasks=1) as supervisor:
        supervisor.task(on_error=handle).schedule(fail)
        await failed.wait()
        with pytest.raises(TooManyTasksError):
            supervisor.require_room()
        gate.set()
        await idle(supervisor)
        supervisor.require_room()


async def test_tasks_that_wait_for_their_moment_do_not_count() -> None:
    """They are not live; the requests in which they wait are bounded by the server."""
    office = Office()
    go_on = anyio.Event()

    @office.app.get("/letters")
    async def hold_letters(tasks: Tasks) -> None:
        for batch in (tasks.after_route, tasks.after_response):
            batch.schedule(let_others_run)
        await go_on.wait()

    async with lifespan(office.app):
        async with anyio.create_task_group() as group:
            group.start_soon(request, office.app, "/letters")
            while not office.observed.events:
                await anyio.lowlevel.checkpoint()
            assert (await office.post()).status == 200
            go_on.set()
        await office.close()


async def test_there_is_no_limit_by_default() -> None:
    """What worked before there was one, works."""
    office = Office(max_tasks=None)
    async with lifespan(office.app):
        assert {(await office.post(count=100)).status for _ in range(20)} == {200}
        assert len(office.supervisor.running) == 2000
        await office.close()


async def test_the_supervisor_itself_refuses_nothing() -> None:
    """Nobody is there who could be answered 503."""
    async with Supervisor(max_tasks=1) as supervisor:
        tasks = [supervisor.schedule(let_others_run) for _ in range(3)]
        for task in tasks:
            await task.wait()

    assert {task.status for task in tasks} == {"succeeded"}


# Once let in


async def test_a_request_that_was_let_in_schedules_what_it_wants() -> None:
    """However many: an endpoint that has begun is not stopped halfway."""
    office = Office(max_tasks=2)
    async with lifespan(office.app):
        await office.post(count=10)
        assert len(office.supervisor.running) == 10
        assert (await office.post()).status == 503
        await office.close()

    assert office.observed.kinds().count(TaskEventKind.FINISHED) == 10


async def test_a_request_that_was_let_in_may_take_tasks_again() -> None:
    """In an endpoint after a dependency, and in an exception handler after both."""
    office = Office()
    timeline = Timeline()

    async def answer(request: Request, error: Exception) -> Response:
        tasks = await get_tasks(request)
        tasks.after_response.task(run_if="error").schedule(timeline.note, "handler")
        return PlainTextResponse("lost", 404)

    office.app.add_exception_handler(LookupError, answer)

    def ask(tasks: Tasks) -> None:
        tasks.schedule(office.carry)

    @office.app.get("/letters", dependencies=[Depends(ask)])
    async def find_letter(request: Request) -> None:
        tasks = await get_tasks(request)
        tasks.schedule(office.carry)
        raise LookupError

    async with lifespan(office.app):
        assert (await request(office.app, "/letters")).status == 404
        assert len(office.supervisor.running) > 1
        await office.close()

    assert timeline == ["handler"]


class PatientRoute(TasksRoute):
    """A route that handles a request again if that has failed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that tries twice."""
        handler = super().get_route_handler()

        async def twice(request: Request) -> Response:
            try:
                return await handler(request)
            except (LookupError, TooManyTasksError) as error:
                await self.before_second_attempt(error)
                return await handler(request)

        return twice

    async def before_second_attempt(self, error: Exception) -> None:
        """Do nothing."""


async def test_a_request_that_was_let_in_may_be_attempted_again() -> None:
    """The first attempt's tasks do not lock out the second one."""
    office = Office()
    router = APIRouter(route_class=PatientRoute)
    attempts: list[Task] = []

    @router.get("/letters")
    async def find_letter(tasks: Tasks) -> None:
        attempts.append(tasks.schedule(office.carry))
        if len(attempts) == 1:
            raise LookupError

    office.app.include_router(router)
    async with lifespan(office.app):
        assert (await request(office.app, "/letters")).status == 200
        assert len(attempts) == 2
        await office.close()


async def test_a_refused_request_may_be_attempted_again() -> None:
    """If there is room by then, it is a request like any other."""
    office = Office()
    timeline = Timeline()

    class WaitingRoute(PatientRoute):
        async def before_second_attempt(self, error: Exception) -> None:
            assert isinstance(error, TooManyTasksError)
            await office.close()

    router = APIRouter(route_class=WaitingRoute)

    @router.get("/letters")
    async def find_letter(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "after_route")
        tasks.after_response.schedule(timeline.note, "after_response")

    office.app.include_router(router)
    async with lifespan(office.app):
        await office.post()
        assert (await request(office.app, "/letters")).status == 200
        await idle(office.supervisor)

    assert timeline == ["after_route", "after_response"]


# What is answered


async def say_busy(connection: Request, error: Exception) -> Response:
    """Be an app's own exception handler."""
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"busy: {type(error).__name__}", 503, {"Retry-After": "60"})


@pytest.mark.parametrize("handled", [TooManyTasksError, 503])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_app_may_answer_in_its_own_words(
    when: str, handled: type[Exception] | int
) -> None:
    """With a handler that is there before add_tasks, or comes later."""
    app = FastAPI()
    if when == "before":
        app.add_exception_handler(handled, say_busy)
    office = Office(app=app)
    if when == "after":
        app.add_exception_handler(handled, say_busy)

    async with lifespan(app):
        await office.post()
        refused = await office.post()
        await office.close()

    assert refused.body == b"busy: TooManyTasksError"
    assert header(refused, "retry-after") == "60"


@pytest.mark.parametrize("general", [HTTPException, FastAPITasksError, Exception])
async def test_a_handler_for_more_than_that_is_not_asked(general: type[Exception]) -> None:
    """The nearest handler answers, as always, and ours is the nearest."""
    office = Office()
    office.app.add_exception_handler(general, say_busy)

    async with lifespan(office.app):
        await office.post()
        refused = await office.post()
        await office.close()

    assert refused.json() == PROBLEM


async def test_a_mounted_app_counts_by_the_outer_ones_limit() -> None:
    """One supervisor runs the tasks of both; the inner app's own limit does not count."""
    inner = FastAPI()
    add_tasks(inner, max_tasks=1)
    office = Office(max_tasks=2)
    office.add_counter(inner)
    office.app.mount("/inner", inner)

    async with lifespan(office.app):
        statuses = [(await office.post(path="/inner/letters")).status for _ in range(2)]
        refused = await office.post(path="/inner/letters")
        outer = await office.post()
        await office.close()

    assert statuses == [200, 200]
    assert refused.json() == outer.json() == PROBLEM


async def test_a_mounted_app_without_add_tasks_answers_as_it_answers_http_exceptions() -> None:
    """It has no handler of ours, and the error is an HTTPException."""
    inner = FastAPI()
    office = Office()
    office.add_counter(inner)
    office.app.mount("/inner", inner)

    async with lifespan(office.app):
        await office.post()
        refused = await office.post(path="/inner/letters")
        await office.close()

    assert (refused.status, refused.json()) == (503, {"detail": PROBLEM["detail"]})
    assert header(refused, "retry-after") == "1"


def test_the_limit_changes_nothing_in_the_schema() -> None:
    """No answer of ours is described in the app's name."""
    assert Office(max_tasks=1).app.openapi() == Office(max_tasks=None).app.openapi()


def test_the_error_tells_whoever_runs_the_app_what_to_do_and_the_client_nothing() -> None:
    """How many tasks an app carries is none of the client's business."""
    error = TooManyTasksError(1000)

    assert "max_tasks=1000" in str(error)
    assert "add_tasks(app, max_tasks=2000)" in str(error)
    assert "1000" not in error.detail
    assert error.limit == 1000
    copied = copy.copy(error)
    assert (str(copied), copied.status_code, copied.headers) == (str(error), 503, error.headers)


# WebSockets


async def shake_hands(app: ASGIApp, path: str, **scope: Any) -> list[Message]:
    """Ask for a WebSocket, and return what the app sends before it is done with it."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    whole = {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "path": path,
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "subprotocols": [],
        **scope,
    }
    await app(whole, receive, send)
    return sent


def add_sockets(office: Office) -> None:
    """Let an app have a WebSocket, and one that is accepted before tasks are taken."""

    async def accept(socket: WebSocket) -> AsyncIterator[None]:
        await socket.accept()
        yield

    async def hang_up(socket: WebSocket) -> AsyncIterator[None]:
        await socket.close(1008)
        yield

    @office.app.websocket("/closed", dependencies=[Depends(hang_up)])
    async def position_of_closed(socket: WebSocket, tasks: Tasks) -> None:
        """Never be reached."""

    @office.app.websocket("/position")
    async def position(socket: WebSocket, tasks: Tasks) -> None:
        """Never be reached."""

    @office.app.websocket("/accepted", dependencies=[Depends(accept)])
    async def position_of_accepted(socket: WebSocket, tasks: Tasks) -> None:
        """Never be reached."""


@pytest.mark.parametrize("scope", [{}, {"extensions": {}}], ids=["none", "others"])
async def test_a_websocket_is_refused_by_closing_it(scope: dict[str, Any]) -> None:
    """Servers answer 403 then; the code is what those get that can tell it."""
    office = Office()
    add_sockets(office)
    async with lifespan(office.app):
        await office.post()
        sent = await shake_hands(office.app, "/position", **scope)
        await office.close()

    assert [(m["type"], m["code"]) for m in sent] == [("websocket.close", 1013)]


async def test_a_websocket_is_refused_with_503_where_the_server_can_say_so() -> None:
    """The same answer as to a request, in the place of the handshake."""
    office = Office()
    add_sockets(office)
    async with lifespan(office.app):
        await office.post()
        sent = await shake_hands(
            office.app, "/position", extensions={"websocket.http.response": {}}
        )
        await office.close()

    start, body = sent
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 503)
    assert dict(start["headers"])[b"retry-after"] == b"1"
    assert json.loads(body["body"]) == PROBLEM


async def test_a_websocket_that_a_dependency_has_accepted_is_closed() -> None:
    """There is no handshake left in which to say it."""
    office = Office()
    add_sockets(office)
    async with lifespan(office.app):
        await office.post()
        sent = await shake_hands(
            office.app, "/accepted", extensions={"websocket.http.response": {}}
        )
        await office.close()

    assert [m["type"] for m in sent] == ["websocket.accept", "websocket.close"]
    assert sent[1]["code"] == 1013


async def test_a_websocket_that_a_dependency_has_closed_is_left_alone() -> None:
    """It has been told already; to close it twice is an error."""
    office = Office()
    add_sockets(office)
    async with lifespan(office.app):
        await office.post()
        sent = await shake_hands(office.app, "/closed")
        await office.close()

    assert [(m["type"], m["code"]) for m in sent] == [("websocket.close", 1008)]


# The record


async def test_one_record_says_that_requests_are_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not one for each: a flood of requests is no flood of records."""
    office = Office()
    async with lifespan(office.app):
        await office.post()
        for _ in range(5):
            assert (await office.post()).status == 503
        await office.close()

    (record,) = (r for r in ours(caplog) if r.levelname == "WARNING")
    assert "max_tasks=1" in record.getMessage()
    assert "503" in record.getMessage()


async def test_the_record_comes_again_after_things_have_calmed_down(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At the limit, where each task that ends lets one request in, it would be a flood too."""

    def records() -> int:
        return len([r for r in ours(caplog) if r.levelname == "WARNING"])

    supervisor = Supervisor(max_tasks=4)
    gates: list[anyio.Event] = []

    def begin(count: int) -> None:
        for _ in range(count):
            gates.append(anyio.Event())
            supervisor.schedule(gates[-1].wait)

    async def end(count: int) -> None:
        left = len(supervisor.running) - count
        for _ in range(count):
            gates.pop().set()
        while len(supervisor.running) > left:
            await anyio.lowlevel.checkpoint()
        await let_others_run()

    def refuse() -> None:
        with pytest.raises(TooManyTasksError):
            supervisor.require_room()

    async with supervisor:
        begin(4)
        refuse()
        await end(1)
        supervisor.require_room()  # 3 are left
        begin(1)
        refuse()
        assert records() == 1
        await end(2)
        supervisor.require_room()  # 2 are left
        begin(2)
        refuse()
        assert records() == 2
        await end(4)

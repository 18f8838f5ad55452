"""Routes with nobody's code between the endpoint and the response: what they are spared of costs
no promise."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import anyio
import pytest
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_tasks import (
    Tasks,
    TasksScheduler,
    add_tasks,
    current_task,
    get_supervisor,
    get_tasks,
    routing,
)

from .asgi import lifespan, request
from .recording import BODY, START, Timeline, idle, let_others_run, ours


class FerryError(Exception):
    """What goes wrong in this module's harbour."""


class Watch:
    """A task that runs until the request is over, and then sees what went wrong in it."""

    def __init__(self) -> None:
        self.request_over = anyio.Event()
        self.seen: list[BaseException | None] = []

    async def keep(self) -> None:
        """Be the task."""
        await self.request_over.wait()
        error = current_task().route_error
        # What breaks off a stream comes in a group from older Starlettes.
        self.seen += getattr(error, "exceptions", (error,))

    async def ask(self, app: FastAPI, **how: object) -> None:
        """Send a request that fails, and wait for its task."""
        async with lifespan(app):
            with pytest.raises((FerryError, ExceptionGroup)):
                await request(app, "/", **how)  # type: ignore[arg-type]
            self.request_over.set()
            await idle(get_supervisor(app))


async def sink(message: Message) -> None:
    """Be a server that fails to send a body."""
    if message["type"] == "http.response.body":
        raise FerryError


async def test_a_task_knows_that_the_server_has_failed_to_send(app: FastAPI) -> None:
    """There is no exit stack that would tell."""
    watch = Watch()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(watch.keep)

    await watch.ask(app, on_send=sink)
    assert [type(error) for error in watch.seen] == [FerryError]


async def test_what_is_asked_for_late_knows_that_the_server_has_failed_to_send(
    app: FastAPI, timeline: Timeline
) -> None:
    """It waits for a response that fails."""
    tasks_of: list[TasksScheduler] = []

    async def sink_later(message: Message) -> None:
        if message["type"] == "http.response.body":
            (tasks,) = tasks_of
            for run_if in ("success", "error"):
                later = tasks.after_response.task(run_if=run_if)  # type: ignore[call-overload]
                later.schedule(timeline.note, run_if)
            raise FerryError

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks_of.append(tasks)

    async with lifespan(app):
        with pytest.raises(FerryError):
            await request(app, "/", on_send=sink_later)
        await idle(get_supervisor(app))
    assert timeline == ["error"]


async def test_a_dependency_that_fails_to_close_is_known_to_a_task(app: FastAPI) -> None:
    """Its route is no such one: the dependency's code comes after the endpoint."""
    watch = Watch()

    async def quay() -> AsyncIterator[str]:
        yield "north"
        raise FerryError

    @app.get("/")
    async def endpoint(tasks: Tasks, quay: str = Depends(quay, scope="function")) -> None:
        tasks.schedule(watch.keep)

    await watch.ask(app)
    assert [type(error) for error in watch.seen] == [FerryError]


async def test_a_stream_that_breaks_off_is_known_to_a_task(app: FastAPI) -> None:
    """A response that is made while it is sent can fail."""
    watch = Watch()

    async def waves() -> AsyncIterator[str]:
        yield "high"
        raise FerryError

    @app.get("/")
    async def endpoint(tasks: Tasks) -> StreamingResponse:
        tasks.schedule(watch.keep)
        return StreamingResponse(waves())

    await watch.ask(app)
    assert [type(error) for error in watch.seen] == [FerryError]


async def test_an_exception_handler_is_not_told_to_use_what_it_has(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    """Its endpoint could not get at tasks; that is no plain route, whose moments are not exact."""
    caplog.set_level(logging.DEBUG, logger="fastapi_tasks")

    async def answer(given: Request, error: Exception) -> Response:
        await get_tasks(given)
        return PlainTextResponse("no ferry", 503)

    app.add_exception_handler(FerryError, answer)

    @app.get("/")
    async def endpoint() -> None:
        raise FerryError

    async with lifespan(app):
        assert (await request(app, "/")).status == 503
    assert not [record for record in ours(caplog) if "takes tasks on a" in record.getMessage()]


class Twice:
    """A middleware that has every request served twice, and sends the second response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._app(dict(scope), receive, swallow)
        await self._app(scope, receive, send)


async def swallow(message: Message) -> None:
    """Send a message to nobody."""


async def test_a_request_that_is_served_twice_has_its_moments_twice(timeline: Timeline) -> None:
    """The first response was sent, as far as its route can tell."""
    app = FastAPI()
    app.add_middleware(Twice)
    add_tasks(app)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "after_route")
        await let_others_run()
        timeline.append("returned")

    async with lifespan(app):
        await request(app, "/")
    assert timeline == ["returned", "after_route"] * 2


async def test_a_request_that_is_served_again_has_no_response_yet(timeline: Timeline) -> None:
    """A shutdown that asks for that, in the middle of the endpoint, gets no answer from before."""
    app = FastAPI()
    app.add_middleware(Twice)
    add_tasks(app)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(timeline.note, "after_response")
        live = get_supervisor(app).live
        assert live is not None
        live.end_responses()
        await let_others_run()
        timeline.append("returned")

    async with lifespan(app):
        await request(app, "/")
    assert timeline == ["returned", "after_response"] * 2


async def test_an_endpoint_may_have_another_one_answer_in_its_place(
    app: FastAPI, timeline: Timeline
) -> None:
    """By the app's router: what it schedules for its response waits for that."""

    @app.get("/inner")
    async def inner(tasks: Tasks) -> None:
        tasks.schedule(timeline.note, "inner")

    @app.get("/")
    async def outer(given: Request, tasks: Tasks) -> None:
        for _ in range(2):
            await app.router({**given.scope, "path": "/inner"}, given.receive, swallow)
        tasks.after_response.schedule(timeline.note, "after_response")
        await let_others_run()
        timeline.append("returned")

    async with lifespan(app):
        await request(app, "/")
        await idle(get_supervisor(app))
    assert timeline == ["inner", "inner", "returned", "after_response"]


async def test_what_is_asked_for_late_does_not_wait_for_background_tasks(app: FastAPI) -> None:
    """The response was sent before they began."""
    background_runs, noted = anyio.Event(), anyio.Event()

    async def ask_late(tasks: TasksScheduler) -> None:
        await background_runs.wait()
        tasks.after_response.schedule(note)

    async def note() -> None:
        noted.set()

    async def wait() -> None:
        background_runs.set()
        await noted.wait()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> Response:
        tasks.schedule(ask_late, tasks)
        return PlainTextResponse("ahoy", background=BackgroundTask(wait))

    async with lifespan(app):
        with anyio.fail_after(10):
            await request(app, "/")


async def test_what_is_asked_for_late_starts_before_dependencies_are_closed(
    app: FastAPI, timeline: Timeline
) -> None:
    """On any route, though it began to watch its exit before the dependency was there."""

    async def ask_late(tasks: TasksScheduler) -> None:
        tasks.after_response.schedule(timeline.note, "after_response")

    async def quay() -> AsyncIterator[str]:
        yield "north"
        await let_others_run()
        timeline.append("closed")

    async def waves(tasks: TasksScheduler) -> AsyncIterator[str]:
        await tasks.schedule(ask_late, tasks).wait()
        yield "high"

    @app.get("/")
    async def endpoint(tasks: Tasks, quay: str = Depends(quay)) -> StreamingResponse:
        return StreamingResponse(waves(tasks))

    async with lifespan(app):
        await request(app, "/")
    assert timeline == ["after_response", "closed"]


async def test_a_fastapi_that_keeps_its_dependencies_elsewhere_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, timeline: Timeline
) -> None:
    """No route is known to be such a one then."""
    monkeypatch.setattr(routing, "_dependant_of", lambda handler: None)
    app = FastAPI()
    add_tasks(app)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(timeline.note, "after_response")
        tasks.after_route.schedule(timeline.note, "after_route")
        timeline.append("returned")

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await idle(get_supervisor(app))
    sent = ["http.response.start", "http.response.body"]
    assert timeline == ["returned", "after_route", *sent, "after_response"]


async def test_what_waits_for_the_response_waits_for_no_middleware(timeline: Timeline) -> None:
    """The server has the response: what else a middleware does has no part in it."""
    app, noted = FastAPI(), anyio.Event()

    class Lingering:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)
            if scope["type"] == "http":
                with anyio.fail_after(10):
                    await noted.wait()

    app.add_middleware(Lingering)
    add_tasks(app)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(note)

    async def note() -> None:
        timeline.append("noted")
        noted.set()

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
    assert timeline == [START, BODY, "noted"]

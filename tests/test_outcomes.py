"""Which tasks start when a request goes wrong, and what becomes of the others."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal

import anyio
import anyio.lowlevel
import pytest
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.exceptions import FastAPIError, RequestValidationError, ResponseValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import PlainSerializer
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from fastapi_tasks import (
    Task,
    TaskEventKind,
    Tasks,
    TasksBatch,
    TasksScheduler,
    TaskStatus,
    add_tasks,
    get_tasks,
)

from .asgi import lifespan, request
from .endpoints import AddStream, Kind, both_kinds, every_stream, returned_stream
from .recording import BODY, START, Observed, Timeline, let_others_run

RUN_IF: tuple[Literal["success", "error", "always"], ...] = ("success", "error", "always")

BOTH_FAILED = {"route, error", "route, always", "response, error", "response, always"}
ONLY_RESPONSE_FAILED = {"route, success", "route, always", "response, error", "response, always"}
BOTH_SUCCEEDED = {"route, success", "route, always", "response, success", "response, always"}


class Requested(list[str]):
    """Which tasks have run, of those that were scheduled for each outcome."""

    def schedule(self, tasks: TasksScheduler) -> None:
        """Schedule a task for each outcome of both batches."""
        self._schedule(tasks.after_route, "route")
        self._schedule(tasks.after_response, "response")

    def _schedule(self, batch: TasksBatch, name: str) -> None:
        for run_if in RUN_IF:
            batch.task(run_if=run_if).schedule(self._run, f"{name}, {run_if}")

    async def _run(self, what: str) -> None:
        self.append(what)


class MisprintError(Exception):
    """What goes wrong in this module's books."""


@pytest.fixture
def ran() -> Requested:
    """Which tasks have run."""
    return Requested()


# The endpoint returned


@both_kinds
@pytest.mark.parametrize("status", [200, 404, 500])
async def test_a_returned_response_is_a_success_whatever_its_status(
    kind: Kind, status: int, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """An endpoint that returns a 500 has done what it was written for."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> Response:
        ran.schedule(tasks)
        return Response(status_code=status)

    async with lifespan(app):
        assert (await request(app, "/")).status == status
        await observed.all_over()

    assert set(ran) == BOTH_SUCCEEDED


# The endpoint raised


@both_kinds
async def test_an_http_exception_lets_only_those_start_that_asked_for_it(
    kind: Kind, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """Also if it was raised on purpose, and its response is as good as any."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        ran.schedule(tasks)
        raise HTTPException(404)

    async with lifespan(app):
        assert (await request(app, "/")).status == 404
        await observed.all_over()

    assert set(ran) == BOTH_FAILED


@both_kinds
async def test_an_error_lets_only_those_start_that_asked_for_it(
    kind: Kind, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """An error that nobody handles is the clearest case."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        ran.schedule(tasks)
        raise MisprintError

    async with lifespan(app):
        with pytest.raises(MisprintError):
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == BOTH_FAILED


@both_kinds
async def test_an_error_with_a_handler_of_the_app_is_an_error(
    kind: Kind, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """The app's exception handlers make a response of it, not a success."""

    async def answer(request: Request, error: Exception) -> Response:
        return PlainTextResponse("misprint", 400)

    app.add_exception_handler(MisprintError, answer)

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        ran.schedule(tasks)
        raise MisprintError

    async with lifespan(app):
        assert (await request(app, "/")).status == 400
        await observed.all_over()

    assert set(ran) == BOTH_FAILED


async def test_success_is_what_tasks_wait_for_by_default(app: FastAPI) -> None:
    """A task with nothing said about it is not started for a request that failed."""
    scheduled: list[Task] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        scheduled.append(tasks.after_route.schedule(anyio.lowlevel.checkpoint))
        scheduled.append(tasks.after_response.schedule(anyio.lowlevel.checkpoint))
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")

    assert [task.status for task in scheduled] == [TaskStatus.CANCELLED] * 2


@pytest.mark.parametrize("batch", ["after_route", "after_response"])
async def test_a_dropped_task_is_cancelled_with_one_record_and_no_exception(
    batch: Literal["after_route", "after_response"],
    app: FastAPI,
    observed: Observed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever waits for it goes on, and the log says which it was and why, once."""
    scheduled: list[Task] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        place = getattr(tasks, batch).task(name="send-receipt")
        scheduled.append(place.schedule(anyio.lowlevel.checkpoint))
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")
        (task,) = scheduled
        assert await task.wait() is None

    assert task.status is TaskStatus.CANCELLED
    assert task.exception() is None
    assert task.attempt == 0
    assert observed.kinds(task) == [TaskEventKind.SCHEDULED, TaskEventKind.DROPPED]
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert (record.name, record.exc_info) == ("fastapi_tasks", None)
    assert task.id in record.getMessage()
    assert "send-receipt" in record.getMessage()
    assert "the request failed" in record.getMessage()


async def test_whoever_waits_for_a_task_goes_on_when_it_is_dropped(app: FastAPI) -> None:
    """The wait ends in the moment of the drop, not only for those who ask afterwards."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        waiters.append(tasks.schedule(tasks.after_response.schedule(let_others_run).wait))
        raise HTTPException(404)

    waiters: list[Task] = []
    async with lifespan(app):
        await request(app, "/")
        with anyio.fail_after(10):
            await waiters[0].wait()

    assert waiters[0].status is TaskStatus.SUCCEEDED


@pytest.mark.parametrize("batch", ["after_route", "after_response"])
@pytest.mark.parametrize("status", [200, 404])
async def test_a_task_that_was_cancelled_before_its_moment_is_not_dropped_too(
    status: int,
    batch: Literal["after_route", "after_response"],
    app: FastAPI,
    observed: Observed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its moment changes nothing about it, however the request ends, and no record tells of it."""
    scheduled: list[Task] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        task = getattr(tasks, batch).schedule(anyio.lowlevel.checkpoint)
        scheduled.append(task)
        assert task.cancel()
        if status != 200:
            raise HTTPException(status)

    async with lifespan(app):
        await request(app, "/")
        await observed.all_over()

    (task,) = scheduled
    assert task.status is TaskStatus.CANCELLED
    assert observed.kinds(task) == [TaskEventKind.SCHEDULED, TaskEventKind.CANCELLED]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_an_endpoint_without_tasks_fails_as_ever(app: FastAPI) -> None:
    """There is nothing to drop, and nothing to trip over."""

    @app.get("/")
    async def endpoint() -> None:
        raise HTTPException(404)

    async with lifespan(app):
        assert (await request(app, "/")).status == 404


async def test_immediate_tasks_go_on_when_the_endpoint_raises(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """They have started, and what has started is nobody's to take back."""
    go_on = anyio.Event()

    async def restore() -> None:
        await go_on.wait()
        timeline.append("restored")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(restore)
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")
        go_on.set()
        await observed.all_over()

    assert timeline == ["restored"]


# When the tasks for an error start


@both_kinds
async def test_the_tasks_for_an_error_start_around_its_response(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """after_response means the response that the exception handler has made, too."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        tasks.after_response.task(run_if="error").schedule(timeline.note, "after_response")
        tasks.after_route.task(run_if="error").schedule(timeline.note, "after_route")
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline.index("after_route") < timeline.index(BODY)
    assert timeline[-2:] == [BODY, "after_response"]


@both_kinds
async def test_an_exception_handler_may_ask_for_the_tasks(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It adds to what the endpoint scheduled for the error, and all wait for its response."""

    async def answer(request: Request, error: Exception) -> Response:
        tasks = await get_tasks(request)
        tasks.after_response.task(run_if="error").schedule(timeline.note, "handler's")
        return PlainTextResponse("misprint", 400)

    app.add_exception_handler(MisprintError, answer)

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        tasks.after_response.task(run_if="error").schedule(timeline.note, "endpoint's")
        raise MisprintError

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline[:2] == [START, BODY]
    assert sorted(timeline[2:]) == ["endpoint's", "handler's"]


@both_kinds
async def test_after_route_tasks_for_an_error_start_when_the_endpoint_raises(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Dependencies that close because of the error find them started."""

    async def dependency() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await let_others_run()
            timeline.append("closing")

    def ask(tasks: Tasks) -> None:
        tasks.after_route.task(run_if="error").schedule(timeline.note, "after_route")

    @app.get("/", dependencies=[Depends(ask), Depends(dependency, scope="function")])
    @kind
    def endpoint() -> None:
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/")
        await observed.all_over()

    assert timeline == ["after_route", "closing"]


async def test_the_tasks_for_an_unhandled_error_start_when_it_has_left_the_app(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Nothing more can be waited for: the 500 is made outside of everything."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.task(run_if="error").schedule(timeline.note, "after_response")
        raise MisprintError

    async with lifespan(app):
        with pytest.raises(MisprintError):
            await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert "after_response" in timeline


async def test_a_dependency_can_schedule_for_the_error_that_it_sees(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """What it schedules for an error, while the error passes through, starts."""

    async def apologize(tasks: Tasks) -> AsyncIterator[None]:
        try:
            yield
        except HTTPException:
            tasks.after_response.task(run_if="error").schedule(timeline.note, "apologized")
            tasks.after_response.schedule(timeline.note, "thanked")
            raise

    @app.get("/", dependencies=[Depends(apologize)])
    async def endpoint() -> None:
        raise HTTPException(404)

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == [START, BODY, "apologized"]


# Before and after the endpoint


@pytest.mark.parametrize("error", [HTTPException(403), RequestValidationError([])], ids=repr)
async def test_a_dependency_that_raises_is_an_error_for_both_batches(
    error: Exception, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """An endpoint that was never reached has not returned."""

    def ask(tasks: Tasks) -> None:
        ran.schedule(tasks)

    def refuse() -> None:
        raise error

    @app.get("/", dependencies=[Depends(ask), Depends(refuse)])
    async def endpoint() -> None:
        """Never be reached."""

    async with lifespan(app):
        assert (await request(app, "/")).status in (403, 422)
        await observed.all_over()

    assert set(ran) == BOTH_FAILED


async def test_a_request_that_is_not_valid_is_an_error_for_both_batches(
    app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """A dependency has scheduled something before FastAPI refuses the endpoint's parameters."""

    def ask(tasks: Tasks) -> None:
        ran.schedule(tasks)

    @app.get("/", dependencies=[Depends(ask)])
    async def endpoint(page: int) -> None:
        """Never be reached."""

    async with lifespan(app):
        assert (await request(app, "/?page=last")).status == 422
        await observed.all_over()

    assert set(ran) == BOTH_FAILED


@both_kinds
async def test_a_response_that_is_not_valid_is_an_error_of_the_response_only(
    kind: Kind, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """The endpoint had returned, so what waited for that has started."""

    @app.get("/", response_model=int)
    @kind
    def endpoint(tasks: Tasks) -> str:
        ran.schedule(tasks)
        return "three"

    async with lifespan(app):
        with pytest.raises(ResponseValidationError):
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == ONLY_RESPONSE_FAILED


@both_kinds
async def test_a_serializer_that_raises_is_an_error_of_the_response_only(
    kind: Kind, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """Whatever it is that goes wrong between the return and the response."""

    def serialize(value: int) -> int:
        raise MisprintError

    @app.get("/", response_model=Annotated[int, PlainSerializer(serialize)])
    @kind
    def endpoint(tasks: Tasks) -> int:
        ran.schedule(tasks)
        return 3

    async with lifespan(app):
        with pytest.raises(Exception, match="Misprint"):
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == ONLY_RESPONSE_FAILED


async def test_the_route_stays_a_success_when_the_response_has_failed(app: FastAPI) -> None:
    """What is scheduled late on a batch is told what was true at the batch's own moment."""
    kept: list[TasksScheduler] = []

    @app.get("/", response_model=int)
    async def endpoint(tasks: Tasks) -> str:
        kept.append(tasks)
        return "three"

    async with lifespan(app):
        with pytest.raises(ResponseValidationError):
            await request(app, "/")
        after_route = kept[0].after_route
        late = [
            after_route.task(run_if=run_if).schedule(anyio.lowlevel.checkpoint) for run_if in RUN_IF
        ]
        for task in late:
            await task.wait()

    assert [task.status for task in late] == [
        *(TaskStatus.SUCCEEDED, TaskStatus.CANCELLED, TaskStatus.SUCCEEDED)
    ]


async def test_a_dependency_of_the_function_that_fails_on_exit_is_an_error_of_the_response_only(
    app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """It ends between the return and the response, and takes the response with it."""

    async def dependency() -> AsyncIterator[None]:
        yield
        raise HTTPException(409)

    @app.get("/", dependencies=[Depends(dependency, scope="function")])
    async def endpoint(tasks: Tasks) -> None:
        ran.schedule(tasks)

    async with lifespan(app):
        assert (await request(app, "/")).status == 409
        await observed.all_over()

    assert set(ran) == ONLY_RESPONSE_FAILED


async def test_a_dependency_of_the_request_that_fails_on_exit_is_too_late_to_count(
    app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """The response was over when it failed."""

    async def dependency() -> AsyncIterator[None]:
        yield
        raise MisprintError

    @app.get("/", dependencies=[Depends(dependency, scope="request")])
    async def endpoint(tasks: Tasks) -> None:
        ran.schedule(tasks)

    async with lifespan(app):
        with pytest.raises(MisprintError):
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == BOTH_SUCCEEDED


@pytest.mark.parametrize(
    ("scope", "complaint"), [("function", UnboundLocalError), ("request", FastAPIError)]
)
@both_kinds
async def test_a_dependency_that_swallows_the_error_makes_no_success_of_it(
    kind: Kind,
    scope: Literal["function", "request"],
    complaint: type[Exception],
    app: FastAPI,
    observed: Observed,
    ran: Requested,
) -> None:
    """FastAPI complains that there is no response, and the endpoint has raised all the same."""

    async def swallow() -> AsyncIterator[None]:
        try:
            yield
        except MisprintError:
            return

    @app.get("/", dependencies=[Depends(swallow, scope=scope)])
    @kind
    def endpoint(tasks: Tasks) -> None:
        ran.schedule(tasks)
        raise MisprintError

    async with lifespan(app):
        with pytest.raises(complaint):
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == BOTH_FAILED


@both_kinds
async def test_a_dependency_that_swallows_a_failed_serialization_makes_no_success_of_it(
    kind: Kind, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """The endpoint has returned, and no response was ever sent."""

    async def swallow() -> AsyncIterator[None]:
        try:
            yield
        except ResponseValidationError:
            return

    swallowed = Depends(swallow)

    # After Tasks, so that it closes before.
    @app.get("/", response_model=int)
    @kind
    def endpoint(tasks: Tasks, nothing: Any = swallowed) -> str:
        ran.schedule(tasks)
        return "three"

    async with lifespan(app):
        with pytest.raises(FastAPIError):
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == ONLY_RESPONSE_FAILED


@pytest.mark.parametrize("place", ["before", "after"])
async def test_the_order_of_dependencies_does_not_change_the_outcome(
    place: Literal["before", "after"], app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """A swallowing dependency may lie inside or outside of the one that takes Tasks."""

    async def swallow() -> AsyncIterator[None]:
        try:
            yield
        except MisprintError:
            return

    def ask(tasks: Tasks) -> None:
        ran.schedule(tasks)

    both = [Depends(swallow), Depends(ask)]

    @app.get("/", dependencies=both if place == "before" else both[::-1])
    async def endpoint() -> None:
        raise MisprintError

    async with lifespan(app):
        with pytest.raises(FastAPIError):
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == BOTH_FAILED


# Streams


async def _endless() -> AsyncIterator[str]:
    while True:
        yield "page"
        await let_others_run()


def _torn_after(*pages: str) -> Callable[[], AsyncIterator[str]]:
    async def chunks() -> AsyncIterator[str]:
        for page in pages:
            yield page
            await let_others_run()
        raise MisprintError

    return chunks


async def _unreadable() -> AsyncIterator[str]:
    yield "one"
    await let_others_run()
    raise OSError("the file has gone")


class Scheduled(list[str]):
    """Which after_response tasks have run."""

    def schedule(self, tasks: TasksScheduler) -> None:
        """Schedule one for each outcome."""
        for run_if in RUN_IF:
            tasks.after_response.task(run_if=run_if).schedule(self._run, run_if)

    async def _run(self, what: str) -> None:
        self.append(what)


# FastAPI and Starlette do not close the generator of a response that was cut off, as trio notices.
cuts_off = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")

asgi_versions = pytest.mark.parametrize("spec_version", ["2.3", "2.4"])


@every_stream
@asgi_versions
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(_torn_after("one"), id="midway"),
        pytest.param(_torn_after(), id="at-once"),
        pytest.param(_unreadable, id="OSError"),
    ],
)
async def test_a_stream_that_raises_midway_is_an_error(
    add_stream: AddStream,
    spec_version: str,
    chunks: Callable[[], AsyncIterator[str]],
    app: FastAPI,
    observed: Observed,
) -> None:
    """Half a response is none, and an OSError of the stream's own is not the client's leaving."""
    ran = Scheduled()
    add_stream(app.router, ran.schedule, chunks)

    async with lifespan(app):
        with pytest.raises((MisprintError, OSError, ClientDisconnect, ExceptionGroup)):
            await request(app, "/", spec_version=spec_version)
        await observed.all_over()

    assert set(ran) == {"error", "always"}


@asgi_versions
async def test_a_stream_from_a_thread_that_raises_midway_is_an_error(
    spec_version: str, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """The endpoint had returned, though."""

    def torn() -> Iterator[str]:
        yield "one"
        raise MisprintError

    @app.get("/")
    def endpoint(tasks: Tasks) -> StreamingResponse:
        ran.schedule(tasks)
        return StreamingResponse(torn())

    async with lifespan(app):
        with pytest.RaisesGroup(
            MisprintError, allow_unwrapped=True
        ):  # Starlette groups it up to 0.45
            await request(app, "/", spec_version=spec_version)
        await observed.all_over()

    assert set(ran) == ONLY_RESPONSE_FAILED


# The client has gone


async def _refuse_body(message: Message) -> None:
    if message["type"] == BODY:
        raise OSError("broken pipe")


@cuts_off
@every_stream
async def test_a_client_that_leaves_midway_as_a_refused_send_tells(
    add_stream: AddStream, app: FastAPI, observed: Observed
) -> None:
    """From ASGI 2.4 on, send raises, which ends the response and makes no error of it."""
    ran = Scheduled()
    add_stream(app.router, ran.schedule, _endless)

    async with lifespan(app):
        with pytest.raises((OSError, ClientDisconnect, ExceptionGroup)):
            await request(app, "/", on_send=_refuse_body)
        await observed.all_over()

    assert set(ran) == {"success", "always"}


@cuts_off
@every_stream
async def test_a_client_that_leaves_midway_as_a_message_tells(
    add_stream: AddStream, app: FastAPI, observed: Observed
) -> None:
    """Up to ASGI 2.3, receive says it, and the stream is cancelled in the middle."""
    ran = Scheduled()
    gone = anyio.Event()

    async def endless() -> AsyncIterator[str]:
        yield "one"
        await anyio.Event().wait()

    async def leave(message: Message) -> None:
        if message["type"] == BODY:
            gone.set()

    add_stream(app.router, ran.schedule, endless)
    async with lifespan(app):
        with anyio.fail_after(10):
            await request(app, "/", on_send=leave, disconnected=gone, spec_version="2.3")
        await observed.all_over()

    assert set(ran) == {"success", "always"}


@both_kinds
async def test_a_client_that_leaves_before_the_first_byte_has_been_served(
    kind: Kind, app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """An order that was placed is placed, whether or not the customer hears of it."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> str:
        ran.schedule(tasks)
        return "lent"

    async def refuse(message: Message) -> None:
        raise OSError("broken pipe")

    async with lifespan(app):
        with pytest.raises(OSError, match="broken pipe"):
            await request(app, "/", on_send=refuse)
        await observed.all_over()

    assert set(ran) == BOTH_SUCCEEDED


async def _pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@cuts_off
@pytest.mark.parametrize("place", ["inside", "outside"])
async def test_a_client_that_leaves_is_noticed_through_a_base_http_middleware(
    place: Literal["inside", "outside"], observed: Observed
) -> None:
    """It keeps the server's refusal to itself, and either cancels the route or lets it go on."""
    app = FastAPI()
    if place == "inside":
        app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_on)
    add_tasks(app, observers=[observed])
    if place == "outside":
        app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_on)
    ran = Scheduled()
    returned_stream(app.router, ran.schedule, _endless)

    async with lifespan(app):
        with pytest.raises(OSError, match="broken pipe"):
            await request(app, "/", on_send=_refuse_body)
        await observed.all_over()

    assert set(ran) == {"success", "always"}


@cuts_off
@every_stream
async def test_a_server_that_cancels_a_response_has_lost_its_client(
    add_stream: AddStream, app: FastAPI, observed: Observed
) -> None:
    """Some servers cancel the app when the client leaves: what the endpoint did is done."""
    ran = Scheduled()
    add_stream(app.router, ran.schedule, _endless)

    async with lifespan(app):
        with anyio.CancelScope() as server:

            async def cancel(message: Message) -> None:
                if message["type"] == BODY:
                    server.cancel()
                    await anyio.lowlevel.checkpoint()

            await request(app, "/", on_send=cancel)
        await observed.all_over()

    assert set(ran) == {"success", "always"}


async def test_a_server_that_cancels_an_endpoint_has_interrupted_it(
    app: FastAPI, observed: Observed, ran: Requested
) -> None:
    """Work that was not finished is an error for whatever should have come after it."""
    server = anyio.CancelScope()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        ran.schedule(tasks)
        server.cancel()
        await anyio.lowlevel.checkpoint()

    async with lifespan(app):
        with server:
            await request(app, "/")
        await observed.all_over()

    assert set(ran) == BOTH_FAILED

"""Routes that are no ``TasksRoute``: their moments are documented, if not exact."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Literal

import anyio
import anyio.lowlevel
import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    HTTPException,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.exceptions import ResponseValidationError
from fastapi.responses import StreamingResponse
from pydantic import PlainSerializer
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message

from fastapi_tasks import Task, TaskConfig, Tasks, TasksRoute, TasksScheduler, TaskStatus, add_tasks

from .asgi import lifespan, request
from .endpoints import Kind, both_kinds
from .recording import BODY, START, Observed, Timeline, let_others_run

RUN_IF: tuple[Literal["success", "error", "always"], ...] = ("success", "error", "always")

SUCCEEDED = {"route, success", "route, always", "response, success", "response, always"}
FAILED = {"route, error", "route, always", "response, error", "response, always"}
ONLY_RESPONSE_FAILED = {"route, success", "route, always", "response, error", "response, always"}


@pytest.fixture
def router() -> APIRouter:
    """A router that knows nothing of tasks, as those of other people's packages do not."""
    return APIRouter()


def schedule_for_each_outcome(tasks: TasksScheduler, timeline: Timeline) -> None:
    """Schedule a task for each outcome of both batches."""
    for run_if in RUN_IF:
        tasks.after_route.task(run_if=run_if).schedule(timeline.note, f"route, {run_if}")
        tasks.after_response.task(run_if=run_if).schedule(timeline.note, f"response, {run_if}")


# Their moments


@both_kinds
async def test_a_plain_route_has_all_three_moments(
    kind: Kind, router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """after_route starts when the response was made, and after_response when it was sent."""

    def serialize(copies: int) -> int:
        timeline.append("serialized")
        return copies

    @router.get("/", response_model=Annotated[int, PlainSerializer(serialize)])
    @kind
    def endpoint(tasks: Tasks) -> int:
        tasks.after_response.schedule(timeline.note, "after_response")
        tasks.after_route.schedule(timeline.note, "after_route")
        return 3

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        await request(app, "/plain/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline[0] == "serialized"
    # It may run while the server takes the first message.
    assert sorted(timeline[1:3]) == sorted(["after_route", START])
    assert timeline[3:] == [BODY, "after_response"]


async def test_an_immediate_task_starts_at_once_on_a_plain_route(
    router: APIRouter, app: FastAPI
) -> None:
    """This moment needs no help from the route."""

    @router.get("/")
    async def endpoint(tasks: Tasks) -> str:
        found = anyio.Event()

        async def search() -> None:
            found.set()

        tasks.schedule(search)
        await found.wait()
        return "found"

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        assert (await request(app, "/plain/")).json() == "found"


async def test_routes_declared_before_add_tasks_are_plain_ones(
    observed: Observed, timeline: Timeline
) -> None:
    """They work, but what a background task holds up comes after it."""
    app = FastAPI()

    @app.get("/before")
    async def before(tasks: Tasks, background: BackgroundTasks) -> None:
        background.add_task(_work_in_background, timeline)
        tasks.after_response.schedule(timeline.note, "after_response")

    add_tasks(app, observers=[observed])

    @app.get("/after")
    async def after(tasks: Tasks, background: BackgroundTasks) -> None:
        background.add_task(_work_in_background, timeline)
        tasks.after_response.schedule(timeline.note, "after_response")

    async with lifespan(app):
        await request(app, "/before")
        await observed.all_over()
        assert timeline == ["background", "after_response"]
        timeline.clear()
        await request(app, "/after")
        await observed.all_over()
        assert timeline == ["after_response", "background"]


async def _work_in_background(timeline: Timeline) -> None:
    await let_others_run()
    timeline.append("background")


async def test_after_response_has_the_place_of_tasks_among_the_dependencies(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """What was opened after it is closed before, what was opened before it is closed after."""

    def dependency(name: str) -> Callable[[], AsyncIterator[None]]:
        async def opened() -> AsyncIterator[None]:
            yield
            await let_others_run()
            timeline.append(f"{name} closed")

        return opened

    def ask(tasks: Tasks) -> None:
        tasks.after_response.schedule(timeline.note, "after_response")

    @router.get(
        "/", dependencies=[Depends(dependency("first")), Depends(ask), Depends(dependency("last"))]
    )
    async def endpoint() -> None:
        return None

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        await request(app, "/plain/")
        await observed.all_over()

    assert timeline == ["last closed", "after_response", "first closed"]


async def test_after_route_has_the_place_of_tasks_among_the_functions_dependencies(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The same order holds in the scope that ends before the response is sent."""

    def dependency(name: str) -> Callable[[], AsyncIterator[None]]:
        async def opened() -> AsyncIterator[None]:
            yield
            await let_others_run()
            timeline.append(f"{name} closed")

        return opened

    def ask(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "after_route")

    @router.get(
        "/",
        dependencies=[
            Depends(dependency("first"), scope="function"),
            Depends(ask),
            Depends(dependency("last"), scope="function"),
        ],
    )
    async def endpoint() -> None:
        return None

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        await request(app, "/plain/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == ["last closed", "after_route", "first closed", START, BODY]


async def test_a_mounted_app_without_add_tasks_has_plain_routes(
    observed: Observed, timeline: Timeline
) -> None:
    """It is served by the outer app's supervisor, with the outer app's configuration."""
    outer, inner = FastAPI(), FastAPI()
    add_tasks(outer, config=TaskConfig(name="outer"), observers=[observed])
    outer.mount("/inner", inner)
    scheduled: list[Task] = []

    @inner.get("/")
    async def endpoint(tasks: Tasks) -> None:
        scheduled.append(tasks.after_route.schedule(timeline.note, "after_route"))
        scheduled.append(tasks.after_response.schedule(timeline.note, "after_response"))

    async with lifespan(outer):
        await request(outer, "/inner/", on_send=timeline.on_send)
        await observed.all_over()

    assert sorted(timeline[:2]) == sorted(["after_route", START])
    assert timeline[2:] == [BODY, "after_response"]
    assert [task.config.name for task in scheduled] == ["outer", "outer"]


# Their outcomes


@both_kinds
@pytest.mark.parametrize("error", [HTTPException(404), LookupError("no such book")], ids=repr)
async def test_an_endpoint_of_a_plain_route_that_raises_is_an_error(
    kind: Kind,
    error: Exception,
    router: APIRouter,
    app: FastAPI,
    observed: Observed,
    timeline: Timeline,
) -> None:
    """As on any other route, and the error's response comes before its tasks here, too."""

    @router.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        schedule_for_each_outcome(tasks, timeline)
        raise error

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        with suppress(LookupError):
            await request(app, "/plain/", on_send=timeline.on_send)
        await observed.all_over()

    messages = [word for word in timeline if word in (START, BODY)]
    assert messages == [START, BODY]
    assert set(timeline) - set(messages) == FAILED
    if isinstance(error, HTTPException):
        assert timeline.index(BODY) < timeline.index("response, error")


async def test_a_plain_routes_response_that_is_not_valid_is_an_error_of_the_response_only(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """This one error tells that the endpoint had returned."""

    @router.get("/", response_model=int)
    async def endpoint(tasks: Tasks) -> str:
        schedule_for_each_outcome(tasks, timeline)
        return "three"

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        with pytest.raises(ResponseValidationError):
            await request(app, "/plain/")
        await observed.all_over()

    assert set(timeline) == ONLY_RESPONSE_FAILED


async def test_a_plain_routes_function_dependency_that_fails_on_exit_is_an_error(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Its response is never sent, so after_response is told of an error, as elsewhere."""

    async def dependency() -> AsyncIterator[None]:
        yield
        raise HTTPException(409)

    def ask(tasks: Tasks) -> None:
        schedule_for_each_outcome(tasks, timeline)

    @router.get("/", dependencies=[Depends(ask), Depends(dependency, scope="function")])
    async def endpoint() -> None:
        return None

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        assert (await request(app, "/plain/")).status == 409
        await observed.all_over()

    of_response = {word for word in timeline if word.startswith("response")}
    assert of_response == {"response, error", "response, always"}


async def test_a_plain_routes_stream_that_raises_midway_is_an_error(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The route had gone well, the response has not."""

    async def torn() -> AsyncIterator[str]:
        yield "one"
        raise LookupError("page two is missing")

    @router.get("/")
    async def endpoint(tasks: Tasks) -> StreamingResponse:
        schedule_for_each_outcome(tasks, timeline)
        return StreamingResponse(torn())

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        with pytest.RaisesGroup(
            LookupError, allow_unwrapped=True
        ):  # Starlette groups it up to 0.45
            await request(app, "/plain/")
        await observed.all_over()

    assert set(timeline) == ONLY_RESPONSE_FAILED


async def test_a_background_task_that_fails_on_a_plain_route_takes_no_task_with_it(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The response was over before it failed, and is no less of a success."""

    async def fail() -> None:
        raise LookupError("out of stock")

    @router.get("/")
    async def endpoint(tasks: Tasks, background: BackgroundTasks) -> None:
        background.add_task(fail)
        schedule_for_each_outcome(tasks, timeline)

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        with pytest.raises(LookupError):
            await request(app, "/plain/")
        await observed.all_over()

    assert set(timeline) == SUCCEEDED


async def test_a_client_that_leaves_a_plain_route_makes_no_error(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """What the endpoint did for it is done."""

    @router.get("/")
    async def endpoint(tasks: Tasks) -> str:
        schedule_for_each_outcome(tasks, timeline)
        return "lent"

    async def refuse(message: Message) -> None:
        raise OSError("broken pipe")

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        with pytest.raises((OSError, ClientDisconnect)):
            await request(app, "/plain/", on_send=refuse)
        await observed.all_over()

    assert set(timeline) == SUCCEEDED


async def test_a_plain_route_that_is_cancelled_midway_is_an_error(
    router: APIRouter, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Its endpoint has not returned."""
    server = anyio.CancelScope()

    @router.get("/")
    async def endpoint(tasks: Tasks) -> None:
        schedule_for_each_outcome(tasks, timeline)
        server.cancel()
        await anyio.lowlevel.checkpoint()

    app.include_router(router, prefix="/plain")
    async with lifespan(app):
        with server:
            await request(app, "/plain/")
        await observed.all_over()

    assert set(timeline) == FAILED


# The record that tells of them


def _records(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "TasksRoute" in r.getMessage()]


async def test_one_debug_record_for_each_plain_route_says_what_it_is(
    router: APIRouter, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the route, what happens there, and the line that makes it exact."""

    @router.get("/books")
    async def books(tasks: Tasks) -> None:
        return None

    @router.get("/maps")
    async def maps(tasks: Tasks) -> None:
        return None

    app.include_router(router)
    caplog.set_level(logging.DEBUG, "fastapi_tasks")
    async with lifespan(app):
        for path in ("/books", "/maps", "/books", "/maps"):
            await request(app, path)

    of_books, of_maps = _records(caplog)
    assert "/books" in of_books
    assert "/maps" in of_maps
    for record in (of_books, of_maps):
        assert "APIRouter(route_class=TasksRoute)" in record


async def test_routes_of_one_path_are_told_apart_in_the_records(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    """Two routers may have the same path under two prefixes, and two methods share a path."""
    for prefix in ("/books", "/maps"):
        router = APIRouter()

        @router.get("/")
        async def read(tasks: Tasks) -> None:
            return None

        @router.post("/")
        async def write(tasks: Tasks) -> None:
            return None

        app.include_router(router, prefix=prefix)
    caplog.set_level(logging.DEBUG, "fastapi_tasks")
    async with lifespan(app):
        for path in ("/books/", "/maps/"):
            for method in ("GET", "POST", "GET"):
                await request(app, path, method=method)

    assert len(_records(caplog)) == 4


async def test_no_record_tells_of_a_plain_route_without_tasks_or_of_a_tasks_route(
    router: APIRouter, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing that could be more exact there."""

    @router.get("/plain")
    async def plain() -> None:
        return None

    @app.get("/exact")
    async def exact(tasks: Tasks) -> None:
        return None

    app.include_router(router)
    caplog.set_level(logging.DEBUG, "fastapi_tasks")
    async with lifespan(app):
        await request(app, "/plain")
        await request(app, "/exact")

    assert _records(caplog) == []


# WebSockets


class Peer:
    """The other end of a WebSocket, in the test's hands.

    :param app: the app
    :param on_send: is awaited with each of the app's messages; raise ``OSError`` there to play a
        server whose peer has gone
    """

    def __init__(
        self, app: ASGIApp, on_send: Callable[[Message], Awaitable[None]] | None = None
    ) -> None:
        self._app = app
        self._on_send = on_send
        self._give, self._take = anyio.create_memory_object_stream[Message](2)
        self._give.send_nowait({"type": "websocket.connect"})
        self.sent: list[str] = []

    async def connect(self) -> None:
        """Serve the WebSocket until the app is done with it."""
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": "/desk",
            "raw_path": b"/desk",
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "subprotocols": [],
            "server": ("testserver", 80),
            "client": ("127.0.0.1", 1),
        }
        with self._give, self._take:
            await self._app(scope, self._take.receive, self._send)

    def leave(self) -> None:
        """Disconnect."""
        self._give.send_nowait({"type": "websocket.disconnect", "code": 1001})

    async def _send(self, message: Message) -> None:
        if self._on_send is not None:
            await self._on_send(message)
        self.sent.append(message["type"])


Handler = Callable[[WebSocket, TasksScheduler], Awaitable[None]]


def add_desk(app: FastAPI, handler: Handler) -> None:
    """Add a WebSocket that is served by the handler once it is accepted."""

    @app.websocket("/desk")
    async def desk(websocket: WebSocket, tasks: Tasks) -> None:
        await websocket.accept()
        await handler(websocket, tasks)


async def test_both_batches_wait_until_a_websocket_handler_has_returned(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """A WebSocket has no response, so both start together."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        schedule_for_each_outcome(tasks, timeline)
        await websocket.send_text("good morning")
        await let_others_run()
        assert timeline == []

    add_desk(app, handle)
    async with lifespan(app):
        await Peer(app).connect()
        await observed.all_over()

    assert set(timeline) == SUCCEEDED


async def test_a_websocket_handler_that_lets_the_disconnect_out_has_returned(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """WebSocketDisconnect is how FastAPI's handlers usually end."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        schedule_for_each_outcome(tasks, timeline)
        await websocket.receive_text()

    add_desk(app, handle)
    peer = Peer(app)
    peer.leave()
    async with lifespan(app):
        with pytest.raises(WebSocketDisconnect):
            await peer.connect()
        await observed.all_over()

    assert set(timeline) == SUCCEEDED


async def test_a_websocket_disconnect_that_the_handler_raises_itself_is_no_error(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Nobody else has said that the peer is gone, and it counts all the same."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        schedule_for_each_outcome(tasks, timeline)
        raise WebSocketDisconnect

    add_desk(app, handle)
    async with lifespan(app):
        with pytest.raises(WebSocketDisconnect):
            await Peer(app).connect()
        await observed.all_over()

    assert set(timeline) == SUCCEEDED


async def test_tasks_start_when_the_peer_has_left_though_the_handler_goes_on(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The handler can wait for the tasks, and fail afterwards: they have started."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        schedule_for_each_outcome(tasks, timeline)
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()
        await observed.all_over()
        timeline.append("cleaned up")
        raise LookupError("the desk is closed")

    add_desk(app, handle)
    peer = Peer(app)
    peer.leave()
    async with lifespan(app):
        with anyio.fail_after(10), pytest.raises(LookupError):
            await peer.connect()

    assert timeline[-1] == "cleaned up"
    assert set(timeline[:-1]) == SUCCEEDED


async def test_a_websocket_without_tasks_ends_as_ever(app: FastAPI) -> None:
    """Its peer leaves, and there is nothing to release."""

    @app.websocket("/desk")
    async def desk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()

    peer = Peer(app)
    peer.leave()
    async with lifespan(app):
        with pytest.raises(WebSocketDisconnect):
            await peer.connect()

    assert peer.sent == ["websocket.accept"]


async def test_a_send_that_finds_no_peer_is_no_error(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The peer has left between two messages."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        schedule_for_each_outcome(tasks, timeline)
        await websocket.send_text("is anybody there?")

    async def refuse(message: Message) -> None:
        if message["type"] == "websocket.send":
            raise OSError("broken pipe")

    add_desk(app, handle)
    async with lifespan(app):
        with pytest.raises((OSError, WebSocketDisconnect)):
            await Peer(app, refuse).connect()
        await observed.all_over()

    assert set(timeline) == SUCCEEDED


async def test_tasks_start_when_a_send_finds_no_peer_though_the_handler_goes_on(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The refusal says as much as a message that the peer has left."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        schedule_for_each_outcome(tasks, timeline)
        with pytest.raises((OSError, WebSocketDisconnect)):
            await websocket.send_text("is anybody there?")
        await observed.all_over()
        timeline.append("cleaned up")

    async def refuse(message: Message) -> None:
        if message["type"] == "websocket.send":
            raise OSError("broken pipe")

    add_desk(app, handle)
    async with lifespan(app):
        await Peer(app, refuse).connect()

    assert timeline[-1] == "cleaned up"
    assert set(timeline[:-1]) == SUCCEEDED


async def test_a_websocket_handler_that_fails_is_an_error_for_both_batches(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Its peer is still there and hears of it."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        schedule_for_each_outcome(tasks, timeline)
        raise LookupError("the desk is closed")

    add_desk(app, handle)
    async with lifespan(app):
        with pytest.raises(LookupError):
            await Peer(app).connect()
        await observed.all_over()

    assert set(timeline) == FAILED


async def test_immediate_tasks_run_beside_a_websocket(app: FastAPI) -> None:
    """The handler goes on with what they found."""

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        found = anyio.Event()

        async def search() -> None:
            found.set()

        tasks.schedule(search)
        await found.wait()
        await websocket.send_text("found")

    add_desk(app, handle)
    peer = Peer(app)
    async with lifespan(app):
        await peer.connect()

    assert peer.sent == ["websocket.accept", "websocket.send"]


async def test_a_websocket_shares_one_scheduler_with_its_dependencies(app: FastAPI) -> None:
    """As a request does."""
    seen: list[TasksScheduler] = []

    def ask(tasks: Tasks) -> None:
        seen.append(tasks)

    @app.websocket("/desk", dependencies=[Depends(ask)])
    async def desk(websocket: WebSocket, tasks: Tasks) -> None:
        await websocket.accept()
        seen.append(tasks)

    async with lifespan(app):
        await Peer(app).connect()

    first, second = seen
    assert first is second


async def test_a_task_that_is_late_for_a_websocket_starts_at_once(app: FastAPI) -> None:
    """After the peer has left, there is nothing to wait for any more."""
    statuses: list[TaskStatus] = []

    async def handle(websocket: WebSocket, tasks: TasksScheduler) -> None:
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()
        for batch in (tasks.after_route, tasks.after_response):
            task = batch.schedule(anyio.lowlevel.checkpoint)
            await task.wait()
            statuses.append(task.status)

    add_desk(app, handle)
    peer = Peer(app)
    peer.leave()
    async with lifespan(app):
        with anyio.fail_after(10):
            await peer.connect()

    assert statuses == [TaskStatus.SUCCEEDED, TaskStatus.SUCCEEDED]


async def test_tasks_that_are_taken_when_the_peer_has_left_start_at_once(app: FastAPI) -> None:
    """A dependency may have heard of it before anybody has asked for Tasks."""
    statuses: list[TaskStatus] = []

    async def greet(websocket: WebSocket) -> None:
        await websocket.accept()
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()

    @app.websocket("/desk", dependencies=[Depends(greet)])
    async def desk(websocket: WebSocket, tasks: Tasks) -> None:
        for batch in (tasks.after_route, tasks.after_response):
            task = batch.schedule(anyio.lowlevel.checkpoint)
            await task.wait()
            statuses.append(task.status)

    peer = Peer(app)
    peer.leave()
    async with lifespan(app):
        with anyio.fail_after(10):
            await peer.connect()

    assert statuses == [TaskStatus.SUCCEEDED, TaskStatus.SUCCEEDED]


async def test_a_tasks_route_router_takes_websockets_as_they_are(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Its class is for HTTP: a WebSocket has the moments that it has elsewhere."""
    router = APIRouter(route_class=TasksRoute)

    @router.websocket("/desk")
    async def desk(websocket: WebSocket, tasks: Tasks) -> None:
        await websocket.accept()
        schedule_for_each_outcome(tasks, timeline)

    app.include_router(router)
    async with lifespan(app):
        await Peer(app).connect()
        await observed.all_over()

    assert set(timeline) == SUCCEEDED

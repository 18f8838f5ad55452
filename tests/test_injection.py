"""A ``TasksRoute`` hands its endpoint the tasks itself, which no endpoint is to notice."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, Security
from fastapi.routing import APIRoute
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_tasks import (
    Supervisor,
    Tasks,
    TasksRoute,
    TasksScheduler,
    add_tasks,
    get_supervisor,
    get_tasks,
)

from .asgi import lifespan, request
from .endpoints import Kind, both_kinds
from .recording import BODY, START, Observed, Timeline, let_others_run

if TYPE_CHECKING:
    from fractions import Fraction

Endpoint = Callable[..., Any]


def scheduling(timeline: Timeline, tasks: Any, *, path: int) -> int:
    """Be the body of an endpoint that has tasks for each moment."""
    assert isinstance(tasks, TasksScheduler)
    tasks.after_response.schedule(timeline.note, "after_response")
    tasks.after_route.schedule(timeline.note, "after_route")
    tasks.schedule(timeline.note, "now")
    return path


# What is annotated with it, and how


def _alias(timeline: Timeline) -> Endpoint:
    def endpoint(path: int, tasks: Tasks) -> int:
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _annotated(timeline: Timeline) -> Endpoint:
    def endpoint(tasks: Annotated[TasksScheduler, Depends(get_tasks)], path: int) -> int:
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _keyword_only(timeline: Timeline) -> Endpoint:
    def endpoint(path: int, *, tasks: Tasks) -> int:
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _beside_a_request(timeline: Timeline) -> Endpoint:
    def endpoint(given: Request, path: int, tasks: Tasks) -> int:
        assert given.path_params == {"path": str(path)}
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _with_a_result_that_nobody_knows(timeline: Timeline) -> Endpoint:
    def endpoint(path: int, tasks: Tasks) -> Fraction:
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _by_default(timeline: Timeline) -> Endpoint:
    def endpoint(path: int, tasks: TasksScheduler = Depends(get_tasks)) -> int:  # noqa: B008
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _with_a_scope(timeline: Timeline) -> Endpoint:
    def endpoint(path: int, tasks: Annotated[TasksScheduler, Security(get_tasks)]) -> int:
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _twice(timeline: Timeline) -> Endpoint:
    def endpoint(path: int, tasks: Tasks, again: Tasks) -> int:
        assert tasks is again
        return scheduling(timeline, tasks, path=path)

    return endpoint


def _beside_a_connection(timeline: Timeline) -> Endpoint:
    def endpoint(given: HTTPConnection, path: int, tasks: Tasks) -> int:
        assert given.path_params == {"path": str(path)}
        return scheduling(timeline, tasks, path=path)

    return endpoint


HANDED = [_alias, _annotated, _keyword_only, _beside_a_request]
RESOLVED = [
    _with_a_result_that_nobody_knows,
    _by_default,
    _with_a_scope,
    _twice,
    _beside_a_connection,
]


def _options(make: Callable[..., Endpoint]) -> dict[str, Any]:
    # FastAPI would want to validate a result by its annotation.
    return {"response_model": None} if make is _with_a_result_that_nobody_knows else {}


@both_kinds
@pytest.mark.parametrize("route_class", [TasksRoute, APIRoute])
@pytest.mark.parametrize("make", [*HANDED, *RESOLVED])
async def test_an_endpoint_gets_its_tasks_however_it_asks(
    make: Callable[[Timeline], Endpoint],
    route_class: type[APIRoute],
    kind: Kind,
    app: FastAPI,
    observed: Observed,
    timeline: Timeline,
) -> None:
    """Its other parameters get theirs, and what it schedules has its moments."""
    router = APIRouter(route_class=route_class)
    router.get("/{path}", **_options(make))(kind(make(timeline)))
    app.include_router(router, prefix="/a")
    async with lifespan(app):
        exchange = await request(app, "/a/17", on_send=timeline.on_send)
        await observed.all_over()

    assert exchange.json() == 17
    assert sorted(timeline) == ["after_response", "after_route", BODY, START, "now"]
    if route_class is TasksRoute:
        assert sorted(timeline[:2]) == ["after_route", "now"]
        assert timeline[2:] == [START, BODY, "after_response"]


@pytest.mark.parametrize("make", [*HANDED, *RESOLVED])
def test_fastapi_resolves_nothing_for_what_is_plain_to_see(
    make: Callable[[Timeline], Endpoint], timeline: Timeline
) -> None:
    """To have it resolve a dependency costs as much as half of a request."""
    route = TasksRoute("/{path}", make(timeline), **_options(make))

    asked = {dependency.call for dependency in route.dependant.dependencies}
    assert asked == (set() if make in HANDED else {get_tasks})


def test_a_routes_endpoint_takes_what_it_took(timeline: Timeline) -> None:
    """But for the tasks, in whose place it is given the connection."""
    endpoint = _keyword_only(timeline)
    signature = inspect.signature(TasksRoute("/{path}", endpoint).endpoint)

    expected = inspect.signature(endpoint)
    assert list(signature.parameters) == ["path", "tasks"]
    assert signature.parameters["path"] == expected.parameters["path"]
    assert signature.parameters["tasks"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.parameters["tasks"].annotation is HTTPConnection
    assert signature.return_annotation == expected.return_annotation


@both_kinds
async def test_a_routes_endpoint_can_be_called_by_hand(kind: Kind, timeline: Timeline) -> None:
    """As unit tests do, with tasks of their own."""

    @kind
    def endpoint(tasks: Tasks, path: int = 3) -> int:
        return scheduling(timeline, tasks, path=path)

    called: Any = TasksRoute("/", endpoint).endpoint
    async with Supervisor() as supervisor:
        tasks = TasksScheduler(supervisor)
        result = called(tasks=tasks, path=5)
        assert (await result if inspect.isawaitable(result) else result) == 5
        result = called(tasks)
        assert (await result if inspect.isawaitable(result) else result) == 3
        await let_others_run()

    assert timeline == ["now", "now"]


@both_kinds
@pytest.mark.parametrize("overrides", [False, True])
async def test_a_routes_endpoint_can_be_added_to_a_route_of_another_class(
    kind: Kind, overrides: bool, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """As packages do that copy routes: there it has the moments of plain ones."""

    @kind
    def endpoint(tasks: Tasks) -> int:
        return scheduling(timeline, tasks, path=1)

    plain = APIRouter()
    plain.add_api_route("/", TasksRoute("/", endpoint).endpoint)
    app.include_router(plain)
    taken: list[TasksScheduler] = []

    def override() -> TasksScheduler:
        taken.append(TasksScheduler(get_supervisor(app)))
        return taken[0]

    if overrides:
        app.dependency_overrides[get_tasks] = override
    async with lifespan(app):
        assert (await request(app, "/", on_send=timeline.on_send)).json() == 1
        for scheduler in taken:
            scheduler.response_over(failed=False)
        await observed.all_over()

    assert len(taken) == overrides
    assert sorted(timeline) == ["after_response", "after_route", BODY, START, "now"]


# In the user's tests


@both_kinds
async def test_an_override_is_a_dependency_like_any_other(kind: Kind, timeline: Timeline) -> None:
    """It may have parameters and dependencies of its own, and close what it has opened."""
    app = FastAPI()
    other = TasksScheduler(Supervisor())

    async def open_for(shelf: int, given: Request, day: str) -> AsyncIterator[str]:
        timeline.append("opened")
        yield f"{given.url.path} {shelf} {day}"
        timeline.append("closed")

    async def override(
        place: str = Depends(open_for),
    ) -> AsyncIterator[TasksScheduler]:
        timeline.append(place)
        yield other
        timeline.append("left")

    router = APIRouter(route_class=TasksRoute, prefix="/{shelf}")

    @router.get("/books")
    @kind
    def endpoint(tasks: Tasks) -> bool:
        timeline.append("endpoint")
        return tasks is other

    app.include_router(router)
    app.dependency_overrides[get_tasks] = override
    exchange = await request(app, "/7/books?day=monday", on_send=timeline.on_send)
    failed = await request(app, "/seven/books")

    assert exchange.json() is True
    assert timeline == ["opened", "/7/books 7 monday", "endpoint", START, BODY, "left", "closed"]
    assert failed.status == 422
    assert [error["loc"] for error in failed.json()["detail"]] == [
        ["path", "shelf"],
        ["query", "day"],
    ]


async def test_an_app_without_overrides_of_its_own_overrides_nothing(timeline: Timeline) -> None:
    """A route may be served by something that is no FastAPI app."""
    app = FastAPI()
    add_tasks(app)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> bool:
        return isinstance(tasks, TasksScheduler)

    class Disguise:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            scope["app"] = object()
            await self._app(scope, receive, send)

    app.add_middleware(Disguise)
    async with lifespan(app):
        assert (await request(app, "/")).json() is True


# What is scheduled late


@pytest.mark.parametrize("has_background", [False, True])
async def test_a_task_may_be_the_first_to_schedule_something_for_the_end(
    has_background: bool, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It starts before dependencies are closed and background tasks run, as ever."""
    sending = anyio.Event()

    async def opened() -> AsyncIterator[None]:
        yield
        timeline.append("closed")

    async def remember(tasks: TasksScheduler) -> None:
        await sending.wait()
        tasks.after_response.schedule(timeline.note, "after_response")

    @app.get("/", dependencies=[Depends(opened)])
    async def endpoint(tasks: Tasks, background: BackgroundTasks) -> None:
        tasks.schedule(remember, tasks)
        if has_background:
            background.add_task(timeline.note, "background")

    async def on_send(message: Any) -> None:
        sending.set()
        await timeline.on_send(message)

    async with lifespan(app):
        await request(app, "/", on_send=on_send)
        await observed.all_over()

    first, *rest = timeline[2:]
    if has_background:
        assert (first, rest) == ("after_response", ["background", "closed"])
    else:
        # It has started, but not had the event loop, which closing a dependency may not give it.
        assert sorted([first, *rest]) == ["after_response", "closed"]
        scheduled = [event.task.moment for event in observed.events if event.kind == "started"]
        assert scheduled == ["now", "after_response"]


@both_kinds
async def test_an_endpoint_that_is_attempted_again_takes_tasks_again(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """By a route class within ours, which calls it twice."""

    class StubbornRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handler = super().get_route_handler()

            async def handle(given: Request) -> Any:
                with contextlib.suppress(LookupError):
                    return await handler(given)
                return await handler(given)

            return handle

    class Route(TasksRoute, StubbornRoute):
        pass

    seen: list[TasksScheduler] = []
    router = APIRouter(route_class=Route)

    @router.get("/")
    @kind
    def endpoint(tasks: Tasks) -> int:
        seen.append(tasks)
        tasks.after_route.schedule(timeline.note, f"attempt {len(seen)}")
        if len(seen) == 1:
            raise LookupError("the catalogue is locked")
        return len(seen)

    app.include_router(router)
    async with lifespan(app):
        assert (await request(app, "/")).json() == 2
        await observed.all_over()

    first, second = seen
    assert first is not second
    assert timeline == ["attempt 2"]


async def test_a_request_that_is_over_is_not_kept(app: FastAPI) -> None:
    """Though a thread has asked for one of its batches just when it ended."""
    seen: list[TasksScheduler] = []
    told: list[Callable[[], object]] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        assert tasks.request is not None
        seen.append(tasks)
        told.append(tasks.request.made_late)

    async with lifespan(app):
        await request(app, "/")
        (tasks,), (tell,) = seen, told
        tell()
        assert get_supervisor(app).open_requests == set()
        assert tasks.request is None
        assert await tasks.after_response.schedule(anyio.sleep, 0).wait() is None

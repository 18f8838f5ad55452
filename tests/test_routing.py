"""A ``TasksRoute`` is the route that it would be without us, for endpoints of every kind."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Annotated, Any

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Response
from fastapi.exceptions import (
    RequestValidationError,
    ResponseValidationError,
    ValidationException,
)
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, PlainSerializer
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_tasks import (
    FastAPITasksUninitializedAppError,
    NoCurrentTaskError,
    Supervisor,
    Task,
    Tasks,
    TasksRoute,
    TasksScheduler,
    UninitializedReason,
    add_tasks,
    current_task,
    get_supervisor,
    get_tasks,
)

from .asgi import lifespan, request
from .endpoints import Kind, both_kinds
from .recording import BODY, START, Observed, Timeline, let_others_run

Endpoint = Callable[..., Any]


@pytest.fixture
def timeline() -> Iterator[Timeline]:
    """What happens in the test, also for endpoints that were made before it."""
    timeline = Timeline()
    token = _timeline.set(timeline)
    yield timeline
    _timeline.reset(token)


# Endpoints of every kind, each of which lends a number of copies

_timeline: ContextVar[Timeline] = ContextVar("timeline")


async def _note(what: str) -> None:
    _timeline.get().append(what)


def _lend(copies: int, tasks: TasksScheduler) -> int:
    tasks.after_response.schedule(_note, "after_response")
    tasks.after_route.schedule(_note, "after_route")
    _timeline.get().append("returned")
    return copies


def lend(copies: int, tasks: Tasks) -> int:
    """Lend some copies.

    They come back.
    """
    return _lend(copies, tasks)


async def lend_in_loop(copies: int, tasks: Tasks) -> int:
    """Lend some copies, without a thread."""
    return _lend(copies, tasks)


def _lend_for(days: int, copies: int, tasks: Tasks) -> int:
    return _lend(copies, tasks)


async def _lend_in_loop_for(days: int, copies: int, tasks: Tasks) -> int:
    return _lend(copies, tasks)


class Desk:
    """A place where copies are lent."""

    def __call__(self, copies: int, tasks: Tasks) -> int:
        """Lend some copies here."""
        return _lend(copies, tasks)

    def lend(self, copies: int, tasks: Tasks) -> int:
        """Lend some copies by a method."""
        return _lend(copies, tasks)

    async def lend_in_loop(self, copies: int, tasks: Tasks) -> int:
        """Lend some copies by a coroutine method."""
        return _lend(copies, tasks)


class QuickDesk:
    """A place where copies are lent without a thread."""

    async def __call__(self, copies: int, tasks: Tasks) -> int:
        """Lend some copies here."""
        return _lend(copies, tasks)


def counted(endpoint: Endpoint) -> Endpoint:
    """Decorate an endpoint as most packages do."""

    @functools.wraps(endpoint)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return endpoint(*args, **kwargs)

    return wrapper


def counted_in_loop(endpoint: Endpoint) -> Endpoint:
    """Decorate a coroutine endpoint as most packages do."""

    @functools.wraps(endpoint)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await endpoint(*args, **kwargs)

    return wrapper


desk, quick_desk = Desk(), QuickDesk()

ENDPOINTS: dict[str, Endpoint] = {
    "function": lend,
    "coroutine-function": lend_in_loop,
    "partial": functools.partial(_lend_for, 14),
    "coroutine-partial": functools.partial(_lend_in_loop_for, 14),
    "partial-with-keyword": functools.partial(_lend_in_loop_for, days=14),
    "instance": desk,
    "coroutine-instance": quick_desk,
    "method": desk.lend,
    "coroutine-method": desk.lend_in_loop,
    "decorated": counted(lend),
    "decorated-coroutine": counted_in_loop(lend_in_loop),
    # FastAPI looks through a decorator to see that there is something to await.
    "decorated-coroutine-by-function": counted(lend_in_loop),
    "decorated-twice": counted_in_loop(counted_in_loop(lend_in_loop)),
    "decorated-instance": counted(desk),
}

every_endpoint = pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS.keys())


@every_endpoint
async def test_endpoints_of_every_kind_have_exact_moments(
    endpoint: Endpoint, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """after_route lies between the endpoint's return and the serialization of what it returned."""

    def serialize(copies: int) -> int:
        timeline.append("serialized")
        return copies

    app.get("/lend", response_model=Annotated[int, PlainSerializer(serialize)])(endpoint)
    async with lifespan(app):
        exchange = await request(app, "/lend?copies=3&days=14", on_send=timeline.on_send)
        await observed.all_over()

    assert exchange.json() == 3
    assert timeline == ["returned", "after_route", "serialized", START, BODY, "after_response"]


# The same route


class Book(BaseModel):
    """What a library has many of."""

    title: str
    copies: int = 1


class NotFound(BaseModel):
    """What it has not."""

    detail: str


async def buy(book: Book, tasks: Tasks, urgent: Annotated[bool, Query()] = False) -> list[Book]:
    """Buy a book.

    Its *copies* are counted.\fThis is for readers of the code.
    """
    return [book]


def _options(route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class, prefix="/books", tags=["books"])
    router.post(
        "/buy/{shelf}",
        name="purchase",
        status_code=201,
        tags=["money"],
        summary="Buy",
        responses={404: {"model": NotFound}},
        deprecated=True,
        response_model_exclude_unset=True,
    )(buy)
    router.put("/buy", operation_id="buyOne", response_model=list[Book])(buy)
    router.patch("/buy", generate_unique_id_function=lambda route: f"my-{route.name}")(buy)
    router.delete("/buy", response_class=PlainTextResponse, description="Sell it.")(buy)
    router.get("/hidden", include_in_schema=False)(buy)
    return router


def _of_every_kind(route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(route_class=route_class)
    for name, endpoint in ENDPOINTS.items():
        router.get(f"/{name}")(endpoint)
    return router


def _openapi(route_class: type[APIRoute], *, prefix: str = "") -> dict[str, Any]:
    inner, app = APIRouter(), FastAPI()
    inner.include_router(_options(route_class), prefix="/inner")
    app.include_router(inner)
    app.include_router(_of_every_kind(route_class), prefix=prefix)
    return app.openapi()


@pytest.mark.parametrize("prefix", ["", "/prefix"])
def test_openapi_is_that_of_an_api_route(prefix: str) -> None:
    """Paths, operation ids, parameters, schemas, tags, summaries and descriptions: all of it."""
    openapi = _openapi(TasksRoute, prefix=prefix)

    assert openapi == _openapi(APIRoute, prefix=prefix)
    assert len(openapi["paths"]) == 2 + len(ENDPOINTS)


@pytest.mark.parametrize(
    "attribute",
    [
        *("name", "unique_id", "operation_id", "path", "path_format", "methods", "tags"),
        *("summary", "description", "deprecated", "status_code", "response_model"),
        *("response_class", "response_model_exclude_unset", "include_in_schema"),
        *("is_json_stream", "is_sse_stream", "stream_item_type"),
    ],
)
def test_a_routes_attributes_are_those_of_an_api_route(attribute: str) -> None:
    """Whoever looks at routes, such as a generator of clients, sees no difference."""
    for make_router in (_options, _of_every_kind):
        exact, plain = make_router(TasksRoute).routes, make_router(APIRoute).routes
        missing = object()
        assert [getattr(route, attribute, missing) for route in exact] == [
            getattr(route, attribute, missing) for route in plain
        ]


@pytest.mark.parametrize(("method", "path"), [("POST", "/books/buy/maps"), ("PUT", "/books/buy")])
async def test_what_a_client_gets_is_what_it_gets_from_an_api_route(method: str, path: str) -> None:
    """Status, headers and body come from the same options, errors included."""
    sent: list[Any] = []
    for route_class in (TasksRoute, APIRoute):
        app = FastAPI()
        app.include_router(_options(route_class))
        add_tasks(app)
        async with lifespan(app):
            for body in (b'{"title": "An Atlas"}', b'{"title": 7}'):
                exchange = await request(
                    app,
                    path,
                    method=method,
                    body=body,
                    headers={"content-type": "application/json"},
                )
                sent.append((exchange.status, exchange.sent[0]["headers"], exchange.body))

    assert sent[:2] == sent[2:]
    assert [status for status, _, _ in sent[:2]] == [201 if method == "POST" else 200, 422]


@every_endpoint
def test_a_routes_endpoint_can_be_told_for_the_users(endpoint: Endpoint) -> None:
    """Its wrapper has the same name, documentation and parameters, and can be unwrapped."""
    route = TasksRoute("/", endpoint)

    assert inspect.unwrap(route.endpoint) is inspect.unwrap(endpoint)
    assert route.endpoint.__doc__ == endpoint.__doc__
    taken, wanted = (inspect.signature(each).parameters for each in (route.endpoint, endpoint))
    assert list(taken) == list(wanted)
    for attribute in ("__name__", "__qualname__"):
        of_class = getattr(type(endpoint), attribute)
        assert getattr(route.endpoint, attribute) == getattr(endpoint, attribute, of_class)


class EndpointInScope:
    """A middleware that keeps what each request's scope says of the endpoint in the end."""

    def __init__(self, app: ASGIApp, *, seen: list[object]) -> None:
        self._app = app
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
        if scope["type"] == "http":
            self._seen.append(scope["endpoint"])


@every_endpoint
async def test_the_endpoint_in_the_scope_is_the_users(
    endpoint: Endpoint, app: FastAPI, timeline: Timeline
) -> None:
    """For dependencies as well as for middlewares, which look for marks on it."""
    seen: list[object] = []

    def look(request: Request) -> None:
        seen.append(request.scope["endpoint"])

    app.add_middleware(EndpointInScope, seen=seen)
    app.get("/lend", dependencies=[Depends(look)])(endpoint)
    async with lifespan(app):
        await request(app, "/lend?copies=3")

    in_dependency, in_middleware = seen
    assert in_dependency is endpoint
    assert in_middleware is endpoint


async def test_a_method_that_is_not_allowed_is_refused_as_ever(app: FastAPI) -> None:
    """The route answers, and says what it would have taken."""
    app.post("/lend")(lend)
    async with lifespan(app):
        exchange = await request(app, "/lend")

    assert exchange.status == 405
    assert (b"allow", b"POST") in exchange.sent[0]["headers"]


# Included more than once


def _lending_router() -> APIRouter:
    router = APIRouter(route_class=TasksRoute)
    router.get("/lend")(lend_in_loop)
    return router


@pytest.mark.parametrize("path", ["/lend", "/a/lend", "/a/b/lend", "/c/lend", "/c/d/lend"])
async def test_a_router_can_be_included_in_many_places(
    path: str, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """With a prefix or without one, in apps and routers: each request starts its tasks once."""
    seen: list[object] = []
    app.add_middleware(EndpointInScope, seen=seen)
    lending = _lending_router()
    nested = APIRouter(prefix="/b")
    nested.include_router(lending)
    exact_nested = APIRouter(prefix="/c", route_class=TasksRoute)
    exact_nested.include_router(lending)
    exact_nested.include_router(lending, prefix="/d")
    app.include_router(lending)
    app.include_router(lending, prefix="/a")
    app.include_router(nested, prefix="/a")
    app.include_router(exact_nested)
    async with lifespan(app):
        exchange = await request(app, f"{path}?copies=3", on_send=timeline.on_send)
        await observed.all_over()

    assert exchange.json() == 3
    assert timeline == ["returned", "after_route", START, BODY, "after_response"]
    assert seen == [lend_in_loop]


async def test_a_router_can_be_included_in_two_apps(timeline: Timeline) -> None:
    """Each request's tasks are run by the supervisor of the app that serves it."""
    lending, supervisors = _lending_router(), list[Supervisor]()

    @lending.get("/supervisor")
    async def look(tasks: Tasks) -> None:
        supervisors.append(tasks.supervisor)

    first, second = FastAPI(), FastAPI()
    for app in (first, second):
        add_tasks(app)
        app.include_router(lending)
    async with lifespan(first), lifespan(second):
        await request(first, "/supervisor")
        await request(second, "/supervisor")

    assert supervisors == [get_supervisor(first), get_supervisor(second)]


async def test_an_endpoint_can_be_added_to_many_routes(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """A route's endpoint can be given to another route, as those do that copy routes."""
    (route,) = _lending_router().routes
    assert isinstance(route, APIRoute)
    app.add_api_route("/copy", route.endpoint)
    seen: list[object] = []
    app.add_middleware(EndpointInScope, seen=seen)
    async with lifespan(app):
        await request(app, "/copy?copies=3", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == ["returned", "after_route", START, BODY, "after_response"]
    assert seen == [lend_in_loop]


async def test_a_users_wrapper_around_a_routes_endpoint_is_an_endpoint(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It returns when it returns, not when what it calls does, though it looks like one of ours."""
    inner = TasksRoute("/", lend_in_loop).endpoint

    @functools.wraps(inner)
    async def outer(*args: Any, **kwargs: Any) -> Any:
        result = await inner(*args, **kwargs)
        await let_others_run()
        timeline.append("wrapper returned")
        return result

    app.get("/lend")(outer)
    seen: list[object] = []
    app.add_middleware(EndpointInScope, seen=seen)
    async with lifespan(app):
        await request(app, "/lend?copies=3", on_send=timeline.on_send)
        await observed.all_over()

    assert seen == [outer]
    assert timeline == [
        *("returned", "wrapper returned", "after_route", START, BODY, "after_response")
    ]


async def test_a_users_wrapper_can_make_a_success_of_an_error(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It is the outermost function that counts, since it is the endpoint."""

    async def fail(tasks: Tasks) -> str:
        tasks.after_route.schedule(timeline.note, "after_route")
        raise LookupError("no such book")

    inner = TasksRoute("/", fail).endpoint

    @functools.wraps(inner)
    async def forgive(*args: Any, **kwargs: Any) -> Any:
        with pytest.raises(LookupError):
            await inner(*args, **kwargs)
        return "another book"

    app.get("/lend")(forgive)
    async with lifespan(app):
        exchange = await request(app, "/lend")
        await observed.all_over()

    assert exchange.json() == "another book"
    assert timeline == ["after_route"]


# With other people's route classes

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StampedRoute(APIRoute):
    """Stamps each response, as the example for custom routes of many an app does."""

    def get_route_handler(self) -> Handler:
        """Return the handler with the stamp."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            response = await handler(request)
            response.headers["x-stamp"] = "read"
            return response

        return handle


class CopyingRoute(APIRoute):
    """Sends another response than the one that was made, as those do that compress."""

    def get_route_handler(self) -> Handler:
        """Return the handler with the copy."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            response = await handler(request)
            return Response(bytes(response.body), headers={"x-stamp": "read"})

        return handle


class WatchedRoute(APIRoute):
    """Runs each handler in a task of its own, as those do that set a time limit."""

    def get_route_handler(self) -> Handler:
        """Return the handler that waits for the other one."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            responses: list[Response] = []

            async def run() -> None:
                responses.append(await handler(request))

            async with anyio.create_task_group() as group:
                group.start_soon(run)
            (response,) = responses
            response.headers["x-stamp"] = "read"
            return response

        return handle


class ForgivingRoute(APIRoute):
    """Makes a response of an error."""

    def get_route_handler(self) -> Handler:
        """Return the handler that catches."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except (LookupError, RequestValidationError) as error:
                return JSONResponse({"detail": str(error)}, 404)

        return handle


def combined(route_class: type[APIRoute]) -> list[type[APIRoute]]:
    """Return a class with both behaviours, in either order, and as ``add_tasks`` makes one."""
    app = FastAPI()
    app.router.route_class = route_class
    add_tasks(app)
    return [
        type("OursFirst", (TasksRoute, route_class), {}),
        type("OursLast", (route_class, TasksRoute), {}),
        app.router.route_class,
    ]


orders = pytest.mark.parametrize(
    "order", [pytest.param(0, id="first"), pytest.param(1, id="last"), pytest.param(2, id="app")]
)


@orders
@pytest.mark.parametrize("other", [StampedRoute, CopyingRoute, WatchedRoute])
async def test_other_route_classes_combine_with_ours(
    other: type[APIRoute], order: int, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """In both orders of inheritance both do their work."""

    def serialize(copies: int) -> int:
        timeline.append("serialized")
        return copies

    router = APIRouter(route_class=combined(other)[order])
    router.get("/lend", response_model=Annotated[int, PlainSerializer(serialize)])(lend)
    app.include_router(router)
    async with lifespan(app):
        exchange = await request(app, "/lend?copies=3", on_send=timeline.on_send)
        await observed.all_over()

    assert (b"x-stamp", b"read") in exchange.sent[0]["headers"]
    assert exchange.json() == 3
    assert timeline == ["returned", "after_route", "serialized", START, BODY, "after_response"]


@orders
@both_kinds
async def test_a_route_class_that_catches_errors_makes_no_success_of_them(
    kind: Kind, order: int, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The endpoint raised, whoever made the response, as with the app's exception handlers."""
    router = APIRouter(route_class=combined(ForgivingRoute)[order])

    @router.get("/lend")
    @kind
    def endpoint(tasks: Tasks) -> None:
        for batch, name in ((tasks.after_route, "route"), (tasks.after_response, "response")):
            batch.schedule(timeline.note, f"{name}, success")
            batch.task(run_if="error").schedule(timeline.note, f"{name}, error")
        raise LookupError("no such book")

    app.include_router(router)
    async with lifespan(app):
        exchange = await request(app, "/lend", on_send=timeline.on_send)
        await observed.all_over()

    assert exchange.status == 404
    assert sorted(timeline[:2]) == [START, "route, error"]
    assert timeline[2:] == [BODY, "response, error"]


@orders
async def test_a_route_class_that_answers_in_the_endpoints_place_makes_no_success_of_it(
    order: int, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """An endpoint that was never reached has not returned, whoever made the response."""
    router = APIRouter(route_class=combined(ForgivingRoute)[order])

    def ask(tasks: Tasks) -> None:
        for batch, name in ((tasks.after_route, "route"), (tasks.after_response, "response")):
            batch.schedule(timeline.note, f"{name}, success")
            batch.task(run_if="error").schedule(timeline.note, f"{name}, error")

    @router.get("/lend", dependencies=[Depends(ask)])
    async def endpoint(copies: int) -> None:
        """Never be reached."""

    app.include_router(router)
    async with lifespan(app):
        assert (await request(app, "/lend?copies=many")).status == 404
        await observed.all_over()

    assert set(timeline) == {"route, error", "response, error"}


@orders
async def test_a_route_class_may_answer_with_one_response_again_and_again(
    order: int, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Nothing of the requests is left on it, however many there are."""
    cached = PlainTextResponse("closed on Mondays")

    class CachingRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                await handler(request)
                return cached

            return handle

    router = APIRouter(route_class=combined(CachingRoute)[order])
    router.get("/lend")(lend_in_loop)
    app.include_router(router)
    async with lifespan(app):
        for _ in range(3):
            timeline.clear()
            await request(app, "/lend?copies=3")
            await observed.all_over()
            assert timeline == ["returned", "after_route", "after_response"]

    assert cached.background is None


@orders
async def test_a_route_class_may_give_a_request_a_second_attempt(
    order: int, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """What the failed one scheduled is dropped, and the other one has moments of its own."""
    attempts: list[int] = []

    class StubbornRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                with contextlib.suppress(LookupError):
                    return await handler(request)
                return await handler(request)

            return handle

    router = APIRouter(route_class=combined(StubbornRoute)[order])

    @router.get("/lend")
    async def endpoint(tasks: Tasks) -> int:
        attempts.append(len(attempts) + 1)
        for batch, name in ((tasks.after_route, "route"), (tasks.after_response, "response")):
            batch.schedule(timeline.note, f"{name} {attempts[-1]}")
        if attempts == [1]:
            raise LookupError("the catalogue is locked")
        return attempts[-1]

    app.include_router(router)
    async with lifespan(app):
        assert (await request(app, "/lend", on_send=timeline.on_send)).json() == 2
        await observed.all_over()

    assert timeline == ["route 2", START, BODY, "response 2"]


@pytest.mark.parametrize("path", ["/exact", "/plain"])
async def test_a_middleware_may_give_a_request_a_second_attempt(
    path: str, observed: Observed, timeline: Timeline
) -> None:
    """The first one is closed by then, and the second one has moments of its own all the same."""
    app, plain = FastAPI(), APIRouter()
    attempts: list[int] = []

    class Stubborn:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            with contextlib.suppress(LookupError):
                return await self._app(scope, receive, send)
            return await self._app(scope, receive, send)

    app.add_middleware(Stubborn)
    add_tasks(app, observers=[observed])

    @app.get("/exact")
    @plain.get("/plain")
    async def endpoint(tasks: Tasks) -> int:
        attempts.append(len(attempts) + 1)
        for batch, name in ((tasks.after_route, "route"), (tasks.after_response, "response")):
            batch.schedule(timeline.note, f"{name} {attempts[-1]}")
        if attempts == [1]:
            raise LookupError("the catalogue is locked")
        return attempts[-1]

    app.include_router(plain)
    async with lifespan(app):
        assert (await request(app, path, on_send=timeline.on_send)).json() == 2
        await observed.all_over()

    assert timeline[-2:] == [BODY, "response 2"]
    assert sorted(timeline[:-2]) == [START, "route 2"]


async def test_an_endpoint_may_call_the_dependency_itself(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Then it takes tasks only when it needs them, with the same moments."""

    @app.get("/lend")
    async def endpoint(request: Request) -> None:
        tasks = await get_tasks(request)
        tasks.after_route.schedule(timeline.note, "after_route")
        tasks.after_response.schedule(timeline.note, "after_response")
        timeline.append("returned")

    async with lifespan(app):
        await request(app, "/lend", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == ["returned", "after_route", START, BODY, "after_response"]


def test_add_tasks_keeps_a_route_class_that_is_one_of_ours_already() -> None:
    """There is nothing to add to it."""

    class OwnRoute(TasksRoute, StampedRoute):
        pass

    app = FastAPI()
    app.router.route_class = OwnRoute
    add_tasks(app)

    assert app.router.route_class is OwnRoute


# What a validation error tells

# They live as long as the session does: FastAPI remembers the files of endpoints by their ids.
VALIDATED = {route_class: _of_every_kind(route_class) for route_class in (APIRoute, TasksRoute)}
INVALID = {
    route_class: APIRouter(route_class=route_class) for route_class in (APIRoute, TasksRoute)
}


async def count(tasks: Tasks) -> str:
    """Return something that is no number."""
    return "three"


def count_in_thread(tasks: Tasks) -> str:
    """Return something that is no number, from a thread."""
    return "three"


for _router in INVALID.values():
    _router.get("/in-loop", response_model=int)(count)
    _router.get("/in-thread", response_model=int)(count_in_thread)
    _router.get("/decorated", response_model=int)(counted_in_loop(count))


async def _error_of(app: FastAPI, path: str) -> ValidationException:
    caught: list[ValidationException] = []

    async def catch(request: Request, error: Any) -> Response:
        caught.append(error)
        return Response(status_code=500)

    for error_class in (RequestValidationError, ResponseValidationError):
        app.add_exception_handler(error_class, catch)
    add_tasks(app)
    async with lifespan(app):
        await request(app, path)
    return caught[0]


@pytest.mark.parametrize("name", ENDPOINTS)
async def test_a_request_that_is_not_valid_names_the_users_endpoint(name: str) -> None:
    """The error says of the endpoint what it says on an APIRoute: file, line and name."""
    told = []
    for router in VALIDATED.values():
        app = FastAPI()
        app.include_router(router)
        told.append(str(await _error_of(app, f"/{name}?copies=many")))

    plain, exact = told
    assert exact == plain


@pytest.mark.parametrize("name", ["in-loop", "in-thread", "decorated"])
async def test_a_response_that_is_not_valid_names_the_users_endpoint(name: str) -> None:
    """The same in the error that is not the client's."""
    told = []
    for router in INVALID.values():
        app = FastAPI()
        app.include_router(router)
        told.append(str(await _error_of(app, f"/{name}")))

    plain, exact = told
    assert exact == plain


async def test_a_validation_error_has_the_file_and_the_line() -> None:
    """Not only where both kinds of route agree, but as they are."""
    app = FastAPI()
    app.include_router(INVALID[TasksRoute])
    error = await _error_of(app, "/in-loop")

    assert error.endpoint_file == __file__
    assert error.endpoint_line == count.__code__.co_firstlineno
    assert error.endpoint_function == "count"


async def test_a_validation_error_of_an_inner_request_names_the_inner_endpoint() -> None:
    """It passes through the route of the outer endpoint, which has nothing to do with it."""
    app = FastAPI()
    app.include_router(INVALID[TasksRoute])
    router = APIRouter(route_class=TasksRoute)

    @router.get("/outer")
    async def outer() -> None:
        await request(inner_app, "/in-loop")

    inner_app = FastAPI()
    inner_app.include_router(INVALID[APIRoute])
    add_tasks(inner_app)
    app.include_router(router)
    async with lifespan(inner_app):
        error = await _error_of(app, "/outer")

    assert error.endpoint_function == "count"
    assert error.endpoint_line == count.__code__.co_firstlineno


# What it costs where it is not used


def _depth() -> int:
    """Return how many frames wait for the caller, coroutines' included."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


@both_kinds
@pytest.mark.parametrize("path", ["/depth", "/nested/depth"])
async def test_a_route_without_tasks_costs_two_frames(kind: Kind, path: str) -> None:
    """One around the handler and one around the endpoint, wherever the router is included."""
    depths: dict[type[APIRoute], tuple[int, int]] = {}
    for route_class in (APIRoute, TasksRoute):
        router = APIRouter(route_class=route_class)

        async def dependency() -> int:
            return _depth()

        in_dependency = Depends(dependency)

        @router.get("/depth")
        @kind
        def endpoint(depth: Any = in_dependency) -> tuple[int, int]:
            return depth, _depth()

        app, outer = FastAPI(), APIRouter(route_class=route_class)
        app.include_router(router)
        outer.include_router(router)
        app.include_router(outer, prefix="/nested")
        depths[route_class] = tuple((await request(app, path)).json())

    in_dependency, in_endpoint = (
        exact - plain for exact, plain in zip(depths[TasksRoute], depths[APIRoute], strict=True)
    )
    assert in_dependency <= 1
    assert in_endpoint <= 2


@both_kinds
async def test_a_route_that_takes_tasks_needs_add_tasks(kind: Kind) -> None:
    """The error says so."""
    app = FastAPI()
    router = APIRouter(route_class=TasksRoute)

    @router.get("/books")
    @kind
    def endpoint(tasks: Tasks) -> None:
        """Be never called."""

    app.include_router(router)
    with pytest.raises(FastAPITasksUninitializedAppError) as caught:
        await request(app, "/books")
    assert caught.value.reason is UninitializedReason.NO_ADD_TASKS


@both_kinds
async def test_an_endpoint_that_cannot_get_at_tasks_costs_nothing(kind: Kind) -> None:
    """FastAPI calls it itself, and shows it in the scope."""
    depths: list[int] = []
    seen: list[object] = []

    @kind
    def endpoint(copies: int) -> None:
        depths.append(_depth())

    async def note(given: Request) -> None:
        seen.append(given.scope["endpoint"])

    for route_class in (APIRoute, TasksRoute):
        router = APIRouter(route_class=route_class)
        router.get("/books")(endpoint)
        app = FastAPI()
        app.include_router(router)
        app.include_router(router, prefix="/noted", dependencies=[Depends(note)])

        async def serve(scope: Scope, receive: Receive, send: Send, app: ASGIApp = app) -> None:
            await app(scope, receive, send)
            seen.append(scope["endpoint"])

        await request(serve, "/books?copies=3")
        await request(app, "/noted/books?copies=3")

    plain, plain_noted, ours, ours_noted = depths
    assert ours == plain
    assert plain_noted < ours_noted <= plain_noted + 2
    assert seen == [endpoint] * 4


@both_kinds
async def test_a_dependency_of_the_including_router_has_exact_moments(
    kind: Kind, timeline: Timeline
) -> None:
    """Though the endpoint has nothing to do with tasks, and serves without them elsewhere."""
    router = APIRouter(route_class=TasksRoute)

    async def schedule(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "after_route")

    def serialize(copies: int) -> int:
        timeline.append("serialized")
        return copies

    @router.get("/books", response_model=Annotated[int, PlainSerializer(serialize)])
    @kind
    def endpoint() -> int:
        timeline.append("returned")
        return 7

    app = FastAPI()
    add_tasks(app)
    app.include_router(router)
    app.include_router(router, prefix="/watched", dependencies=[Depends(schedule)])
    async with lifespan(app):
        assert (await request(app, "/books")).json() == 7
        assert (await request(app, "/watched/books")).json() == 7
        assert (await request(app, "/books")).json() == 7

    once = ["returned", "serialized"]
    assert timeline == [*once, "returned", "after_route", "serialized", *once]


@both_kinds
async def test_a_route_without_tasks_needs_no_add_tasks(kind: Kind) -> None:
    """A package can give its router exact moments and leave it to the app to have tasks."""
    router = APIRouter(route_class=TasksRoute)
    cached = PlainTextResponse("closed on Mondays")

    @router.get("/response")
    @kind
    def response() -> Response:
        return cached

    @router.get("/error")
    @kind
    def error() -> None:
        raise HTTPException(404)

    @router.get("/number")
    @kind
    def number(copies: int) -> int:
        return copies

    app = FastAPI()
    app.include_router(router)
    assert (await request(app, "/response")).body == b"closed on Mondays"
    assert (await request(app, "/error")).status == 404
    assert (await request(app, "/number?copies=3")).json() == 3
    assert (await request(app, "/number?copies=many")).status == 422
    assert cached.background is None


# A request from within a request


@pytest.mark.parametrize(
    ("path", "inner_has_tasks"),
    [
        ("/inner", True),
        ("/fails", True),
        ("/without", False),
        ("/plain", True),
        ("/elsewhere", False),
        ("/other", True),
        ("/other-plain", True),
    ],
)
async def test_a_request_from_within_an_endpoint_has_tasks_of_its_own(
    path: str, inner_has_tasks: bool, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Whatever the inner one is and however it ends, the outer one's batches wait for their own."""
    plain, other, other_plain, bare = APIRouter(), FastAPI(), APIRouter(), FastAPI()
    add_tasks(other, observers=[observed])

    @app.get("/inner")
    @plain.get("/plain")
    @other.get("/other")
    @other_plain.get("/other-plain")
    async def inner(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "inner route")
        tasks.after_response.schedule(timeline.note, "inner response")

    @app.get("/fails")
    async def fails(tasks: Tasks) -> None:
        for batch, name in ((tasks.after_route, "route"), (tasks.after_response, "response")):
            batch.task(run_if="error").schedule(timeline.note, f"inner {name}")
        raise HTTPException(404)

    @app.get("/without")
    async def without() -> None:
        return None

    bare_router = APIRouter(route_class=TasksRoute)
    bare_router.get("/elsewhere")(without)
    bare.include_router(bare_router)
    app.include_router(plain)
    other.include_router(other_plain)
    elsewhere = {"/elsewhere": bare, "/other": other, "/other-plain": other}
    target = elsewhere.get(path, app)

    @app.get("/outer")
    async def outer(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "outer route")
        tasks.after_response.schedule(timeline.note, "outer response")
        await request(target, path)
        await let_others_run()
        assert get_supervisor() is get_supervisor(app)
        timeline.append("outer returned")

    async with lifespan(app), lifespan(other):
        await request(app, "/outer", on_send=timeline.on_send)
        await observed.all_over()

    if inner_has_tasks:
        # Which of them comes first is a plain route's affair, and on trio anybody's.
        assert sorted(timeline[:2]) == ["inner response", "inner route"]
        del timeline[:2]
    assert timeline == ["outer returned", "outer route", START, BODY, "outer response"]


async def test_a_request_that_an_endpoint_makes_of_its_own_is_no_mounted_apps(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes with what the app has put into the scope, and is the app's own for all that."""
    app = FastAPI()
    add_tasks(app, observers=[observed], grace=1)

    @app.get("/inner")
    async def inner(tasks: Tasks) -> str:
        return tasks.after_route.schedule(let_others_run).name

    @app.get("/outer")
    async def outer(request: Request) -> None:
        async def send(message: Message) -> None:
            sent.append(message["type"])

        await app({**request.scope, "path": "/inner", "raw_path": b"/inner"}, request.receive, send)

    sent: list[str] = []
    async with lifespan(app):
        await request(app, "/outer")
        await observed.all_over()

    assert sent == [START, BODY]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_route_that_an_endpoint_calls_leaves_it_its_moments(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Through the router, without the middleware, both share what the app knows of the request."""

    def serialize(copies: int) -> int:
        timeline.append("serialized")
        return copies

    @app.get("/inner")
    async def inner() -> None:
        timeline.append("inner")

    @app.get("/outer", response_model=Annotated[int, PlainSerializer(serialize)])
    async def outer(request: Request, tasks: Tasks) -> int:
        async def send(message: Message) -> None:
            return None

        tasks.after_route.schedule(timeline.note, "outer route")
        scope = {**request.scope, "path": "/inner", "raw_path": b"/inner"}
        await app.router(scope, request.receive, send)
        await let_others_run()
        timeline.append("outer returned")
        return 3

    async with lifespan(app):
        await request(app, "/outer")
        await observed.all_over()

    assert timeline == ["inner", "outer returned", "outer route", "serialized"]


async def test_an_endpoint_can_send_a_request_to_itself(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Even if nobody takes Tasks on the inner way, so that nothing tells the two calls apart."""
    router = APIRouter(route_class=TasksRoute)

    def ask(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "outer route")

    @router.get("/call")
    async def call(inner: bool = False) -> None:
        if not inner:
            await request(app, "/without/call?inner=true")
            await let_others_run()
            timeline.append("outer returned")

    app.include_router(router, prefix="/with", dependencies=[Depends(ask)])
    app.include_router(router, prefix="/without")
    async with lifespan(app):
        await request(app, "/with/call")
        await observed.all_over()

    assert timeline == ["outer returned", "outer route"]


async def test_a_request_from_within_a_task_has_tasks_of_its_own(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The task has the context of the request that scheduled it, which is still going on."""
    seen: list[TasksScheduler] = []

    @app.get("/inner")
    async def inner(tasks: Tasks) -> None:
        seen.append(tasks)
        tasks.after_route.schedule(timeline.note, "inner route")

    @app.get("/outer")
    async def outer(tasks: Tasks) -> None:
        seen.append(tasks)
        tasks.after_route.schedule(timeline.note, "outer route")
        await tasks.schedule(request, app, "/inner").wait()
        await let_others_run()
        timeline.append("outer returned")

    async with lifespan(app):
        await request(app, "/outer")
        await observed.all_over()

    assert seen[0] is not seen[1]
    assert timeline == ["inner route", "outer returned", "outer route"]


@pytest.mark.parametrize("path", ["/exact", "/plain", "/other"])
async def test_a_request_from_within_a_task_is_no_part_of_it(path: str, app: FastAPI) -> None:
    """It has its own app's supervisor and no current task; afterwards the task is that again."""
    plain, other = APIRouter(), FastAPI()
    add_tasks(other)
    target = other if path == "/other" else app

    @app.get("/exact")
    @plain.get("/plain")
    @other.get("/other")
    async def inner(tasks: Tasks) -> None:
        assert get_supervisor() is get_supervisor(target)
        with pytest.raises(NoCurrentTaskError):
            current_task()

    async def outer() -> Task:
        await request(target, path)
        return current_task()

    app.include_router(plain)
    async with lifespan(app), lifespan(other):
        task = get_supervisor(app).schedule(outer)
        assert await task.wait() is task


async def test_requests_at_once_do_not_share_their_tasks(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The end of one says nothing about another that is still being served."""
    waiting, go_on = anyio.Event(), anyio.Event()

    @app.get("/slow")
    async def slow(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "slow")
        waiting.set()
        await go_on.wait()

    @app.get("/quick")
    async def quick(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "quick")

    async with lifespan(app), anyio.create_task_group() as group:
        group.start_soon(request, app, "/slow")
        await waiting.wait()
        await request(app, "/quick")
        await let_others_run()
        assert timeline == ["quick"]
        go_on.set()

    assert timeline == ["quick", "slow"]


# In the user's tests


async def test_tasks_can_be_overridden() -> None:
    """A test puts a scheduler of its own in the place of the request's; add_tasks is not needed."""
    app, supervisor = FastAPI(), Supervisor()
    router = APIRouter(route_class=TasksRoute)
    other = TasksScheduler(supervisor)
    seen: list[TasksScheduler] = []

    def ask(tasks: Tasks) -> None:
        seen.append(tasks)

    @router.get("/", dependencies=[Depends(ask)])
    async def endpoint(tasks: Tasks) -> None:
        seen.append(tasks)

    app.include_router(router)
    app.dependency_overrides[get_tasks] = lambda: other
    await request(app, "/")

    assert seen == [other, other]

"""``add_tasks`` and ``get_supervisor``: how an app gets its supervisor, and when it has none."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_tasks import (
    AddTasksError,
    FastAPITasksUninitializedAppError,
    Supervisor,
    SupervisorStateError,
    TaskConfig,
    TaskEvent,
    TaskEventKind,
    Tasks,
    TasksRoute,
    TaskStatus,
    UninitializedReason,
    UnsupportedFastAPIError,
    add_tasks,
    get_supervisor,
    get_tasks,
)

from . import asgi


async def deliver() -> str:
    """Deliver a parcel, as the tests' simplest task."""
    return "delivered"


def a_route(app: FastAPI) -> None:
    """Declare an endpoint that schedules a task and answers with its status after a while."""

    @app.get("/parcels")
    async def send_parcel(tasks: Tasks) -> str:
        return await tasks.schedule(deliver).wait()


def a_router(app: FastAPI) -> None:
    """Include a router with such an endpoint."""
    router = APIRouter(prefix="/nested", route_class=TasksRoute)

    @router.get("/parcels")
    async def send_parcel(tasks: Tasks) -> str:
        return await tasks.schedule(deliver).wait()

    app.include_router(router)


class PassOn:
    """An ASGI middleware that does nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        await self.app(scope, receive, send)


def a_middleware(app: FastAPI) -> None:
    """Add a middleware."""
    app.add_middleware(PassOn)


STEPS: list[Callable[[FastAPI], None]] = [a_route, a_router, a_middleware]


@pytest.mark.parametrize("position", range(len(STEPS) + 1))
async def test_it_may_come_before_or_after_everything_else(position: int) -> None:
    """Nobody has to remember where in a module the line belongs."""
    app = FastAPI()
    for step in [*STEPS[:position], add_tasks, *STEPS[position:]]:
        step(app)
    async with asgi.lifespan(app):
        assert (await asgi.request(app, "/parcels")).json() == "delivered"
        assert (await asgi.request(app, "/nested/parcels")).json() == "delivered"


async def test_routes_declared_on_the_app_from_then_on_are_exact() -> None:
    """The line changes what it can change without touching what is there."""
    app = FastAPI()
    before = app.router.route_class
    add_tasks(app)
    assert before is APIRoute
    assert app.router.route_class is TasksRoute


def test_what_is_not_said_is_as_documented() -> None:
    """By ``add_tasks`` and by a supervisor that is made by hand."""
    app = FastAPI()
    add_tasks(app)
    for settings in (get_supervisor(app).settings, Supervisor().settings):
        assert (settings.config, settings.observers) == (TaskConfig(), ())
        assert (settings.grace, settings.shutdown_timeout, settings.threads) == (0, None, 40)


def test_a_second_call_with_the_same_arguments_does_nothing() -> None:
    """Two modules may both see to it that the app has tasks."""
    app = FastAPI()
    add_tasks(app, grace=3, config=TaskConfig(shield=True))
    supervisor, middlewares = get_supervisor(app), list(app.user_middleware)
    add_tasks(app, grace=3, config=TaskConfig(shield=True))
    assert get_supervisor(app) is supervisor
    assert app.user_middleware == middlewares


def test_a_second_call_with_other_arguments_is_an_error() -> None:
    """Which of both counts would otherwise depend on the order of imports."""
    app = FastAPI()
    add_tasks(app, grace=3)
    with pytest.raises(AddTasksError, match=r"with other arguments.*one add_tasks"):
        add_tasks(app, grace=4)


@pytest.mark.parametrize("wrong", [Starlette(), APIRouter(), "app", None])
def test_it_takes_fastapi_apps_only(wrong: Any) -> None:
    """A router or another framework's app would fail much later, and less clearly."""
    with pytest.raises(AddTasksError, match=rf"got {type(wrong).__name__}.*add_tasks\(app\)"):
        add_tasks(wrong)


def test_a_class_in_the_place_of_an_app_is_told_apart() -> None:
    """The error shows that it is the brackets that are missing."""
    wrong: Any = FastAPI
    with pytest.raises(AddTasksError, match=r"got the class FastAPI.*app = FastAPI\(\)"):
        add_tasks(wrong)


async def test_an_app_that_is_being_served_is_too_late() -> None:
    """Its middlewares are fixed by then."""
    app = FastAPI()
    async with asgi.lifespan(app):
        with pytest.raises(AddTasksError, match=r"being served already.*after app = FastAPI"):
            add_tasks(app)
    with pytest.raises(FastAPITasksUninitializedAppError):
        get_supervisor(app)


def test_a_route_class_of_the_users_is_kept() -> None:
    """An app may have had good reasons for it."""

    class Timed(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handler = super().get_route_handler()

            async def timed(request: Request) -> Any:
                response = await handler(request)
                response.headers["x-timed"] = "yes"
                return response

            return timed

    app = FastAPI()
    app.router.route_class = Timed
    add_tasks(app)
    a_route(app)
    with TestClient(app) as client:
        response = client.get("/parcels")
    assert (response.json(), response.headers["x-timed"]) == ("delivered", "yes")
    assert issubclass(app.router.route_class, TasksRoute)


def test_a_tasks_route_class_of_the_users_is_left_alone() -> None:
    """It is what add_tasks wants already."""

    class Mine(TasksRoute):
        pass

    app = FastAPI()
    app.router.route_class = Mine
    add_tasks(app)
    assert app.router.route_class is Mine


# What isn't running is told apart


def test_without_add_tasks_the_error_says_so() -> None:
    """The most likely mistake, and the line that mends it."""
    app = FastAPI()
    a_route(app)
    with (
        TestClient(app) as client,
        pytest.raises(FastAPITasksUninitializedAppError, match=r"add_tasks\(app\)") as caught,
    ):
        client.get("/parcels")
    assert caught.value.reason is UninitializedReason.NO_ADD_TASKS


def test_without_a_lifespan_the_error_names_the_ways_to_get_one() -> None:
    """The second most likely one: a test that doesn't enter its client."""
    app = FastAPI()
    add_tasks(app)
    a_route(app)
    with pytest.raises(FastAPITasksUninitializedAppError) as caught:
        TestClient(app).get("/parcels")
    assert caught.value.reason is UninitializedReason.NOT_STARTED
    for way in (
        "with TestClient(app)",
        "LifespanManager(app)",
        "get_supervisor(app)",
        "--lifespan",
    ):
        assert way in str(caught.value)


def test_after_the_lifespan_the_error_says_so() -> None:
    """A client that is used after its block is told apart from one that never had one."""
    app = FastAPI()
    add_tasks(app)
    a_route(app)
    with TestClient(app) as client:
        client.get("/parcels")
    with pytest.raises(FastAPITasksUninitializedAppError) as caught:
        client.get("/parcels")
    assert caught.value.reason is UninitializedReason.STOPPED


async def test_a_lifespan_context_entered_by_hand_needs_the_supervisors() -> None:
    """It bypasses the middleware; the line that the error names mends it."""
    app = FastAPI()
    add_tasks(app)
    a_route(app)
    async with app.router.lifespan_context(app):
        with pytest.raises(FastAPITasksUninitializedAppError, match="lifespan_context"):
            await asgi.request(app, "/parcels")
    async with get_supervisor(app), app.router.lifespan_context(app):
        assert (await asgi.request(app, "/parcels")).json() == "delivered"


def test_a_supervisor_is_asked_for_with_its_app_or_from_within() -> None:
    """Without either there is nothing that it could be told from."""
    with pytest.raises(FastAPITasksUninitializedAppError, match=r"get_supervisor\(app\)") as caught:
        get_supervisor()
    assert caught.value.reason is UninitializedReason.NO_CONTEXT


@pytest.mark.parametrize("missing", ["fastapi_inner_astack", "fastapi_function_astack"])
async def test_a_fastapi_without_its_exit_stacks_is_told_apart(missing: str) -> None:
    """They are no documented interface, so that one day they may be gone."""
    app = FastAPI()
    add_tasks(app)

    @app.get("/parcels")
    async def send_parcel(request: Request) -> None:
        del request.scope[missing]
        await get_tasks(request)

    async with asgi.lifespan(app):
        with pytest.raises(UnsupportedFastAPIError, match=rf"{missing}.*pip install 'fastapi"):
            await asgi.request(app, "/parcels")


async def test_a_route_that_is_none_of_fastapis_is_told_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the log's level is, the error names what can be done there instead."""
    caplog.set_level(logging.DEBUG, logger="fastapi_tasks")
    app = FastAPI()
    add_tasks(app)

    async def send_parcel(request: Request) -> Response:
        return Response(repr(await get_tasks(request)))

    app.add_route("/parcels", send_parcel)
    async with asgi.lifespan(app):
        with pytest.raises(UnsupportedFastAPIError, match=r"get_supervisor\(app\)"):
            await asgi.request(app, "/parcels")


# The lifespan


async def test_the_supervisor_runs_while_the_apps_own_lifespan_does() -> None:
    """Start-up hooks may schedule, and at shutdown nothing is closed while tasks still run."""
    is_open = False

    async def use_resource() -> bool:
        await draining.wait()
        return is_open

    def observe(event: TaskEvent) -> None:
        if event.kind is TaskEventKind.DRAIN_STARTED:
            draining.set()

    @asynccontextmanager
    async def resources(app: FastAPI) -> AsyncIterator[None]:
        nonlocal is_open
        is_open = True
        started.append(get_supervisor(app).task(shield=True).schedule(use_resource))
        yield
        is_open = False

    started: list[Any] = []
    draining = anyio.Event()
    app = FastAPI(lifespan=resources)
    add_tasks(app, observers=[observe])
    async with asgi.lifespan(app):
        await started[0].started.wait()
    assert started[0].result() is True
    assert is_open is False


async def test_a_failing_start_up_is_reported_as_it_is() -> None:
    """The app's error is not wrapped in one of ours, and its tasks are seen to their end."""

    @asynccontextmanager
    async def failing(app: FastAPI) -> AsyncIterator[None]:
        kept.append(get_supervisor(app).task(shield=True).schedule(deliver))
        raise ConnectionError("no database")
        yield

    kept: list[Any] = []
    app = FastAPI(lifespan=failing)
    add_tasks(app)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append((message["type"], kept[0].status))

    with pytest.raises(ConnectionError, match="no database"):
        await app({"type": "lifespan", "state": {}}, receive, send)
    assert sent == [("lifespan.startup.failed", TaskStatus.SUCCEEDED)]


async def test_a_failing_shutdown_is_reported_as_it_is() -> None:
    """By then the tasks are over."""

    @asynccontextmanager
    async def failing(app: FastAPI) -> AsyncIterator[None]:
        yield
        raise ConnectionError("closed before")

    app = FastAPI(lifespan=failing)
    add_tasks(app)
    with pytest.RaisesGroup(
        pytest.RaisesExc(asgi.LifespanFailedError, match="closed before"), ConnectionError
    ):
        async with asgi.lifespan(app):
            pass


async def test_one_app_has_one_lifespan_at_a_time() -> None:
    """A second one fails where the server looks, instead of looking like an app without any."""
    app = FastAPI()
    add_tasks(app)
    async with asgi.lifespan(app), AsyncExitStack() as stack:
        with pytest.RaisesGroup(
            pytest.RaisesExc(asgi.LifespanFailedError, match="while the supervisor is running"),
            SupervisorStateError,
        ):
            await stack.enter_async_context(asgi.lifespan(app))
        assert get_supervisor(app).is_running


async def test_a_lifespan_that_is_given_up_drains_the_supervisor() -> None:
    """A server that dies without a shutdown leaves no task behind unnoticed."""
    app = FastAPI()
    add_tasks(app)
    running = anyio.Event()

    async def receive() -> Any:
        if get_supervisor(app).is_running:
            running.set()
            await anyio.sleep_forever()
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        return None

    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(app, {"type": "lifespan", "state": {}}, receive, send))
        await running.wait()
        task = get_supervisor(app).task(shield=True).schedule(anyio.sleep_forever)
        await task.started.wait()
        group.cancel_scope.cancel()
    assert not get_supervisor(app).is_running
    assert get_supervisor(app).running == ()


async def test_a_supervisor_that_was_drained_by_hand_is_not_drained_twice() -> None:
    """Whoever wants to drain earlier than the server does, may."""
    app = FastAPI()
    add_tasks(app)
    async with asgi.lifespan(app):
        await get_supervisor(app).drain()


async def test_scopes_of_other_protocols_are_passed_on() -> None:
    """The middleware has no business with what is neither HTTP nor WebSocket nor lifespan."""
    seen: list[str] = []

    class Answer:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["type"])

    app = FastAPI()
    app.add_middleware(Answer)
    add_tasks(app)
    await app({"type": "telegraph"}, None, None)  # type: ignore[arg-type]
    assert seen == ["telegraph"]


# Apps in apps


async def test_a_mounted_apps_configuration_goes_over_the_outer_ones() -> None:
    """Its tasks run on the outer supervisor, since its own lifespan never runs."""
    outer, inner = FastAPI(), FastAPI()
    add_tasks(outer, config=TaskConfig(name="outer", shield=True))
    add_tasks(inner, config=TaskConfig(name="inner"))
    configs: list[TaskConfig] = []

    @inner.get("/parcels")
    async def send_parcel(tasks: Tasks) -> None:
        configs.append(tasks.schedule(deliver).config)
        assert get_supervisor() is get_supervisor(outer)

    outer.mount("/inner", inner)
    async with asgi.lifespan(outer):
        await asgi.request(outer, "/inner/parcels")
    assert configs == [TaskConfig(name="inner", shield=True)]


async def test_what_a_mounted_app_asks_for_in_vain_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A grace that nobody keeps to would be found out at a shutdown."""
    outer, inner = FastAPI(), FastAPI()
    add_tasks(outer)
    add_tasks(inner, grace=10)
    a_route(inner)
    outer.mount("/inner", inner)
    async with asgi.lifespan(outer):
        await asgi.request(outer, "/inner/parcels")
        await asgi.request(outer, "/inner/parcels")
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "outer" in warnings[0].getMessage()


async def test_a_mounted_app_that_asks_for_nothing_in_vain_is_not_warned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its configuration counts, and of the other arguments it has given none."""
    outer, inner = FastAPI(), FastAPI()
    add_tasks(outer, grace=10)
    add_tasks(inner, config=TaskConfig(name="inner"))
    a_route(inner)
    outer.mount("/inner", inner)
    async with asgi.lifespan(outer):
        await asgi.request(outer, "/inner/parcels")

    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


async def test_a_mounted_app_without_an_outer_supervisor_has_none() -> None:
    """The error says why: of a mounted app, nobody runs the lifespan."""
    outer, inner = FastAPI(), FastAPI()
    add_tasks(inner)
    a_route(inner)
    outer.mount("/inner", inner)
    async with asgi.lifespan(outer):
        with pytest.raises(FastAPITasksUninitializedAppError, match="mounted"):
            await asgi.request(outer, "/inner/parcels")


async def test_two_apps_in_one_process_are_apart() -> None:
    """Neither the shutdown nor the configuration of one is the other's."""
    one, other = FastAPI(), FastAPI()
    add_tasks(one)
    add_tasks(other, config=TaskConfig(shield=True))
    async with asgi.lifespan(one):
        async with asgi.lifespan(other):
            assert get_supervisor(other).schedule(deliver).config.shielded
        assert not get_supervisor(one).schedule(deliver).config.shielded
        assert not get_supervisor(other).is_running


async def test_http_errors_of_an_endpoint_are_answered_as_before() -> None:
    """Tasks do not change what a client sees."""
    app = FastAPI()
    add_tasks(app)

    @app.get("/lost")
    async def lost(tasks: Tasks) -> None:
        raise HTTPException(404, "no such parcel")

    async with asgi.lifespan(app):
        exchange = await asgi.request(app, "/lost")
    assert (exchange.status, exchange.json()) == (404, {"detail": "no such parcel"})

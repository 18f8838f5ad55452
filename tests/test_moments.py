"""When tasks start on a route that knows its moments: a ``TasksRoute``."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Response, Security
from fastapi.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    StreamingResponse,
)
from fastapi.security import SecurityScopes
from pydantic import PlainSerializer
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.types import Message

from fastapi_tasks import (
    Supervisor,
    Task,
    TaskConfig,
    TaskEvent,
    Tasks,
    TasksRoute,
    TasksScheduler,
    TaskStatus,
    add_tasks,
    get_supervisor,
    get_tasks,
)

from .asgi import lifespan, request
from .endpoints import AddStream, Kind, both_kinds, every_yield
from .recording import BODY, START, Observed, Timeline, let_others_run

# The three moments


async def test_an_immediate_task_runs_beside_a_coroutine_endpoint(app: FastAPI) -> None:
    """The endpoint can wait for what the task does, so it does not have to end first."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> str:
        found = anyio.Event()

        async def search() -> None:
            found.set()

        tasks.schedule(search)
        await found.wait()
        return "found"

    async with lifespan(app):
        assert (await request(app, "/")).json() == "found"


async def test_a_task_knows_the_moment_that_it_was_scheduled_for(
    app: FastAPI, observed: Observed
) -> None:
    """From the first event on, configured or not, and though the moment has passed."""
    moments: list[str] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        async def schedule_late() -> None:
            moments.append(tasks.after_route.schedule(let_others_run).moment)

        for place in (tasks, tasks.after_route, tasks.after_response):
            place.schedule(let_others_run)
            moments.append(place.task(name="other").schedule(let_others_run).moment)
        tasks.after_response.schedule(schedule_late)

    def observe(event: TaskEvent) -> None:
        told.append(event.task.moment)

    told: list[str] = []
    supervisor = Supervisor(observers=[observe])
    TasksScheduler(supervisor).after_route.schedule(let_others_run)
    async with lifespan(app):
        await request(app, "/")
        await observed.all_over()

    assert moments == ["now", "after_route", "after_response", "after_route"]
    assert told == ["after_route"]
    assert supervisor.schedule(let_others_run).moment == "now"


async def test_what_an_interrupt_has_left_waiting_starts_with_the_response(
    timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next starts the rest."""

    def submit(self: Supervisor, task: Task) -> None:
        monkeypatch.undo()
        self.submit(task)
        raise KeyboardInterrupt

    async with Supervisor(grace=10) as supervisor:
        tasks = TasksScheduler(supervisor)
        for name in ("first", "second"):
            tasks.after_route.schedule(timeline.note, name)
        monkeypatch.setattr(Supervisor, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            tasks.route_over(failed=False)
        tasks.response_over(failed=True)
    assert sorted(timeline) == ["first", "second"]  # on trio in any order


async def test_a_turn_of_the_loop_is_owed_once() -> None:
    """To what was started since the last one."""
    async with Supervisor() as supervisor:
        tasks = TasksScheduler(supervisor)
        tasks.schedule(let_others_run)
        assert [tasks.route_over(failed=False), tasks.takes_turn()] == [True, False]
        tasks.after_response.schedule(let_others_run)
        tasks.response_over(failed=False)
        assert [tasks.takes_turn(), tasks.takes_turn()] == [True, False]


async def test_an_immediate_task_runs_beside_an_endpoint_in_a_thread(app: FastAPI) -> None:
    """The same from a thread, while the event loop is free."""

    @app.get("/")
    def endpoint(tasks: Tasks) -> bool:
        found = threading.Event()

        async def search() -> None:
            found.set()

        tasks.schedule(search)
        return found.wait(timeout=10)

    async with lifespan(app):
        assert (await request(app, "/")).json() is True


@both_kinds
async def test_each_batch_has_its_moment(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """after_route lies between return and serialization, after_response behind the last byte."""

    def serialize(copies: int) -> int:
        timeline.append("serialized")
        return copies

    @app.get("/", response_model=Annotated[int, PlainSerializer(serialize)])
    @kind
    def endpoint(tasks: Tasks) -> int:
        tasks.after_response.schedule(timeline.note, "after_response")
        tasks.after_route.schedule(timeline.note, "after_route")
        timeline.append("returned")
        return 3

    async with lifespan(app):
        exchange = await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert exchange.json() == 3
    assert timeline == ["returned", "after_route", "serialized", START, BODY, "after_response"]


@both_kinds
@pytest.mark.parametrize("moment", ["immediate", "after_route"])
async def test_tasks_have_run_to_their_first_await_when_the_response_starts(
    kind: Kind,
    moment: Literal["immediate", "after_route"],
    app: FastAPI,
    observed: Observed,
    timeline: Timeline,
) -> None:
    """Started means that the first line of each task has run, and no more than that."""
    go_on = anyio.Event()

    async def restore(page: int) -> None:
        timeline.append("first line")
        await go_on.wait()

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> None:
        place = tasks if moment == "immediate" else tasks.after_route
        for page in range(20):
            place.schedule(restore, page)

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        assert timeline == ["first line"] * 20 + [START, BODY]
        go_on.set()
        await observed.all_over()


@both_kinds
async def test_immediate_tasks_of_a_dependency_have_started_too(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It does not matter who scheduled what the response must not overtake."""

    def dependency(tasks: Tasks) -> None:
        tasks.schedule(timeline.note, "immediate")

    @app.get("/", dependencies=[Depends(dependency)])
    @kind
    def endpoint() -> None:
        return None

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == ["immediate", START, BODY]


async def test_the_response_is_over_when_its_last_send_has_returned(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """A server that is slow to take the last byte holds up after_response tasks."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(timeline.note, "after_response")

    async def on_send(message: Message) -> None:
        await timeline.on_send(message)
        timeline.append("sent")

    async with lifespan(app):
        await request(app, "/", on_send=on_send)
        await observed.all_over()

    assert timeline == [START, "sent", BODY, "sent", "after_response"]


# Responses of every kind


async def _pages() -> AsyncIterator[bytes]:
    for page in (b"one", b"two"):
        yield page


def _pages_in_thread() -> Iterator[bytes]:
    yield from (b"one", b"two")


@both_kinds
@pytest.mark.parametrize(
    "make_response",
    [
        pytest.param(lambda path: JSONResponse({"open": True}), id="JSONResponse"),
        pytest.param(lambda path: Response(status_code=204), id="no-content"),
        pytest.param(lambda path: RedirectResponse("/elsewhere"), id="RedirectResponse"),
        pytest.param(lambda path: FileResponse(path / "book.txt"), id="FileResponse"),
        pytest.param(lambda path: StreamingResponse(_pages()), id="async-stream"),
        pytest.param(lambda path: StreamingResponse(_pages_in_thread()), id="stream"),
    ],
)
async def test_responses_of_every_kind_keep_the_moments(
    kind: Kind,
    make_response: Callable[[Path], Response],
    app: FastAPI,
    observed: Observed,
    timeline: Timeline,
    tmp_path: Path,
) -> None:
    """What an endpoint makes itself starts with after_route and ends before after_response."""
    (tmp_path / "book.txt").write_text("Once upon a time")

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> Response:
        tasks.after_response.schedule(timeline.note, "after_response")
        tasks.after_route.schedule(timeline.note, "after_route")
        return make_response(tmp_path)

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline[:3] == ["after_route", START, BODY]
    assert timeline[-2:] == [BODY, "after_response"]


async def test_after_route_comes_before_the_first_step_of_a_stream(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The endpoint has returned when the generator is there; none of it has run yet."""

    async def pages() -> AsyncIterator[bytes]:
        timeline.append("first page")
        yield b"one"
        timeline.append("last page")
        yield b"two"

    @app.get("/")
    async def endpoint(tasks: Tasks) -> StreamingResponse:
        tasks.after_response.schedule(timeline.note, "after_response")
        tasks.after_route.schedule(timeline.note, "after_route")
        return StreamingResponse(pages())

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == [
        *("after_route", START, "first page", BODY, "last page", BODY),
        *(BODY, "after_response"),
    ]


@every_yield
async def test_an_endpoint_that_yields_ends_with_its_stream(
    add_stream: AddStream, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """after_response waits for the last chunk, though it was scheduled before the first."""

    async def chunks() -> AsyncIterator[str]:
        yield "one"
        await let_others_run()
        yield "two"
        await let_others_run()
        timeline.append("exhausted")

    add_stream(
        app.router,
        lambda tasks: tasks.after_response.schedule(timeline.note, "after_response"),
        chunks,
    )
    async with lifespan(app):
        exchange = await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert b"two" in exchange.body
    assert "exhausted" in timeline
    assert timeline[-2:] == [BODY, "after_response"]


@every_yield
async def test_an_endpoint_that_yields_has_returned_before_its_response_starts(
    add_stream: AddStream, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """What a dependency scheduled on after_route has started when the first byte is sent."""

    async def dependency(tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, "after_route")

    async def chunks() -> AsyncIterator[str]:
        yield "one"

    router = APIRouter(route_class=TasksRoute)
    add_stream(router, lambda tasks: None, chunks)
    app.include_router(router, prefix="/stream", dependencies=[Depends(dependency)])
    async with lifespan(app):
        await request(app, "/stream/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline[:2] == ["after_route", START]


@every_yield
async def test_what_a_stream_schedules_on_after_route_starts_at_once(
    add_stream: AddStream, app: FastAPI, observed: Observed
) -> None:
    """In the body of a generator the route is over already, so the stream can wait for it."""
    scheduled: list[Task] = []

    async def chunks() -> AsyncIterator[str]:
        await scheduled[0].wait()
        yield "one"

    add_stream(
        app.router,
        lambda tasks: scheduled.append(tasks.after_route.schedule(anyio.lowlevel.checkpoint)),
        chunks,
    )
    async with lifespan(app):
        with anyio.fail_after(10):
            exchange = await request(app, "/")

    assert b"one" in exchange.body


# A response that is returned again and again


@both_kinds
async def test_a_cached_response_serves_every_request_with_its_own_tasks(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Nothing of a request is left on the object: neither its tasks nor its background."""
    own = BackgroundTask(timeline.note, "its own")
    cached = PlainTextResponse("closed on Mondays", background=own)

    @app.get("/{visitor}")
    @kind
    def endpoint(visitor: str, tasks: Tasks) -> Response:
        tasks.after_response.schedule(timeline.note, visitor)
        return cached

    async with lifespan(app):
        for visitor in ("Ada", "Ben", "Cleo"):
            timeline.clear()
            exchange = await request(app, f"/{visitor}")
            await observed.all_over()
            assert sorted(timeline) == sorted([visitor, "its own"])
            assert exchange.body == b"closed on Mondays"

    assert cached.background is own


@both_kinds
async def test_a_cached_response_does_not_keep_injected_background_tasks(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Each request runs those that it has added itself."""
    cached = PlainTextResponse("closed on Mondays")

    @app.get("/{visitor}")
    @kind
    def endpoint(visitor: str, tasks: Tasks, background: BackgroundTasks) -> Response:
        background.add_task(timeline.note, visitor)
        return cached

    async with lifespan(app):
        await request(app, "/Ada")
        await request(app, "/Ben")

    assert timeline == ["Ada", "Ben"]
    assert cached.background is None


async def test_a_cached_response_can_be_sent_to_two_clients_at_once(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The tasks of the slow one wait for its own last byte, not for the other's."""
    cached = PlainTextResponse("closed on Mondays")
    sending, go_on = anyio.Event(), anyio.Event()

    @app.get("/{visitor}")
    async def endpoint(visitor: str, tasks: Tasks) -> Response:
        tasks.after_response.schedule(timeline.note, visitor)
        return cached

    async def be_slow(message: Message) -> None:
        sending.set()
        await go_on.wait()

    async def slow() -> None:
        await request(app, "/slow", on_send=be_slow)

    async with lifespan(app), anyio.create_task_group() as group:
        group.start_soon(slow)
        await sending.wait()
        await request(app, "/quick")
        await let_others_run()
        assert timeline == ["quick"]
        go_on.set()

    assert timeline[:2] == ["quick", "slow"]


# A response that is returned once


class Catalogue(Response):
    """A response with something large on it, which its copies share."""

    class Plates:
        """What takes up the memory."""

    plates: Plates


@both_kinds
async def test_a_long_task_does_not_keep_the_response_alive(kind: Kind, app: FastAPI) -> None:
    """It may run for hours, and nobody needs what was sent long before."""
    gate = anyio.Event()
    plates: list[weakref.ref[Catalogue.Plates]] = []

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> Response:
        tasks.schedule(gate.wait)
        catalogue = Catalogue()
        catalogue.plates = Catalogue.Plates()
        plates.append(weakref.ref(catalogue.plates))
        return catalogue

    async with lifespan(app):
        await request(app, "/")
        await let_others_run()  # the event loop still has hold of what it has just been given
        gc.collect()
        assert len(get_supervisor(app).running) == 1
        assert plates[0]() is None
        gate.set()


# Beside what FastAPI brings


@both_kinds
async def test_tasks_start_before_injected_background_tasks(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Both run, ours first, even if the other one has nothing to wait for."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks, background: BackgroundTasks) -> None:
        background.add_task(timeline.note, "background")
        tasks.after_response.schedule(timeline.note, "after_response")

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == [START, BODY, "after_response", "background"]


@both_kinds
async def test_tasks_start_before_the_background_of_a_response(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The same where the endpoint has given its response a background itself."""

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> Response:
        tasks.after_response.schedule(timeline.note, "after_response")
        return Response(background=BackgroundTask(timeline.note, "background"))

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == [START, BODY, "after_response", "background"]


async def test_background_tasks_do_not_hold_up_tasks(app: FastAPI, observed: Observed) -> None:
    """A background task can even wait for one of ours."""

    @app.get("/")
    async def endpoint(tasks: Tasks, background: BackgroundTasks) -> None:
        background.add_task(tasks.after_response.schedule(anyio.lowlevel.checkpoint).wait)

    async with lifespan(app):
        with anyio.fail_after(10):
            await request(app, "/")


async def test_a_background_task_that_fails_takes_no_task_with_it(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The response was over before it failed."""

    async def fail() -> None:
        raise LookupError("out of stock")

    @app.get("/")
    async def endpoint(tasks: Tasks, background: BackgroundTasks) -> None:
        background.add_task(fail)
        tasks.after_response.schedule(timeline.note, "after_response")

    async with lifespan(app):
        with pytest.raises(LookupError):
            await request(app, "/")
        await observed.all_over()

    assert timeline == ["after_response"]


# Routers, mounts and middlewares


@both_kinds
async def test_routers_in_routers_keep_the_moments(
    kind: Kind, app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Prefixes and dependencies of every level come on top, and all share the request's tasks."""

    def visit(shelf: str, tasks: Tasks) -> None:
        tasks.after_route.schedule(timeline.note, f"visited {shelf}")

    def count(tasks: Tasks) -> None:
        tasks.after_response.schedule(timeline.note, "counted")

    shelves = APIRouter(
        prefix="/shelves/{shelf}", route_class=TasksRoute, dependencies=[Depends(visit)]
    )
    branches = APIRouter(prefix="/branches")

    @shelves.get("/books/{book}")
    @kind
    def endpoint(shelf: str, book: int, tasks: Tasks) -> str:
        timeline.append("returned")
        return f"{shelf} {book}"

    branches.include_router(shelves, dependencies=[Depends(count)])
    app.include_router(branches, prefix="/town")
    async with lifespan(app):
        exchange = await request(
            app, "/town/branches/shelves/maps/books/7", on_send=timeline.on_send
        )
        await observed.all_over()

    assert exchange.json() == "maps 7"
    assert timeline == ["returned", "visited maps", START, BODY, "counted"]


async def test_a_mounted_app_adds_its_configuration_to_the_outer_ones(
    observed: Observed, timeline: Timeline
) -> None:
    """Its tasks are run by the supervisor of the app that the server starts."""
    outer, inner = FastAPI(), FastAPI()
    add_tasks(outer, config=TaskConfig(name="outer", shield=True), observers=[observed])
    add_tasks(inner, config=TaskConfig(name="inner"))
    outer.mount("/inner", inner)
    scheduled: list[Task] = []

    @inner.get("/")
    async def endpoint(tasks: Tasks) -> None:
        scheduled.append(tasks.after_response.schedule(timeline.note, "after_response"))
        scheduled.append(tasks.after_route.schedule(timeline.note, "after_route"))
        assert get_supervisor() is get_supervisor(outer)

    async with lifespan(outer):
        await request(outer, "/inner/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == ["after_route", START, BODY, "after_response"]
    for task in scheduled:
        assert (task.config.name, task.config.shielded) == ("inner", True)


async def test_a_mounted_app_can_do_without_add_tasks(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It takes part in what the outer app has, with exact moments on its TasksRoutes."""
    inner = FastAPI()
    router = APIRouter(route_class=TasksRoute)

    @router.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.schedule(timeline.note, "after_response")
        tasks.after_route.schedule(timeline.note, "after_route")

    inner.include_router(router)
    app.mount("/inner", inner)
    async with lifespan(app):
        await request(app, "/inner/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline == ["after_route", START, BODY, "after_response"]


async def _pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@both_kinds
@pytest.mark.parametrize("place", ["inside", "outside"])
async def test_the_moments_are_the_same_beside_a_base_http_middleware(
    kind: Kind,
    place: Literal["inside", "outside"],
    observed: Observed,
    timeline: Timeline,
) -> None:
    """It runs the route in a task of its own and hands on each message; on either side of ours."""
    app = FastAPI()
    if place == "inside":
        app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_on)
    add_tasks(app, observers=[observed])
    if place == "outside":
        app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_on)

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> str:
        tasks.after_response.schedule(timeline.note, "after_response")
        tasks.after_route.schedule(timeline.note, "after_route")
        return "lent"

    async with lifespan(app):
        exchange = await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert exchange.json() == "lent"
    assert timeline[:2] == ["after_route", START]
    # The route's last send returns when the middleware has the message, so the two may swap.
    assert sorted(timeline[2:]) == sorted(["after_response", *[BODY] * timeline.count(BODY)])


# Scheduled late, or from elsewhere


@pytest.mark.parametrize("batch", ["after_route", "after_response"])
async def test_a_task_whose_moment_has_passed_starts_at_once(
    batch: Literal["after_route", "after_response"], app: FastAPI
) -> None:
    """Whoever keeps ``tasks`` beyond its request can go on scheduling, from any thread."""
    kept: list[TasksScheduler] = []

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        kept.append(tasks)

    async with lifespan(app):
        await request(app, "/")
        late = getattr(kept[0], batch)
        here = late.schedule(anyio.lowlevel.checkpoint)
        there = await anyio.to_thread.run_sync(late.schedule, anyio.lowlevel.checkpoint)
        with anyio.fail_after(10):
            await here.wait()
            await there.wait()

    assert (here.status, there.status) == (TaskStatus.SUCCEEDED, TaskStatus.SUCCEEDED)


async def test_a_task_can_be_scheduled_from_a_thread_that_nobody_knows(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Also from one that the endpoint has started itself, for each of the moments."""

    @app.get("/")
    def endpoint(tasks: Tasks) -> None:
        def work() -> None:
            tasks.after_response.schedule(timeline.note, "after_response")
            tasks.after_route.schedule(timeline.note, "after_route")
            tasks.schedule(timeline.note, "immediate")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert sorted(timeline[:2]) == ["after_route", "immediate"]
    assert timeline[2:] == [START, BODY, "after_response"]


async def test_a_task_can_be_scheduled_from_a_coroutine_endpoints_thread(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """What a worker thread schedules has started before the response, too."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        await anyio.to_thread.run_sync(
            tasks.after_response.schedule, timeline.note, "after_response"
        )
        await anyio.to_thread.run_sync(tasks.after_route.schedule, timeline.note, "after_route")
        await anyio.to_thread.run_sync(tasks.schedule, timeline.note, "immediate")

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert sorted(timeline[:2]) == ["after_route", "immediate"]
    assert timeline[2:] == [START, BODY, "after_response"]


# Dependencies


async def test_a_dependency_of_the_function_schedules_on_both_sides_of_its_yield(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It ends between the route and the response, so it finds one moment passed, one to come."""

    async def dependency(tasks: Tasks) -> AsyncIterator[None]:
        tasks.after_route.schedule(timeline.note, "route, early")
        tasks.after_response.schedule(timeline.note, "response, early")
        yield
        timeline.append("closing")
        tasks.after_route.schedule(timeline.note, "route, late")
        tasks.after_response.schedule(timeline.note, "response, late")

    @app.get("/", dependencies=[Depends(dependency, scope="function")])
    async def endpoint() -> None:
        timeline.append("returned")

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline[:3] == ["returned", "route, early", "closing"]
    assert timeline.index("route, late") < timeline.index(BODY)
    assert timeline[-3] == BODY
    assert sorted(timeline[-2:]) == ["response, early", "response, late"]


async def test_a_dependency_of_the_request_schedules_on_both_sides_of_its_yield(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """It ends after the response: what it schedules then, starts then."""

    async def dependency(tasks: Tasks) -> AsyncIterator[None]:
        tasks.after_route.schedule(timeline.note, "route, early")
        tasks.after_response.schedule(timeline.note, "response, early")
        yield
        await let_others_run()
        timeline.append("closing")
        tasks.after_route.schedule(timeline.note, "route, late")
        tasks.after_response.schedule(timeline.note, "response, late")

    @app.get("/", dependencies=[Depends(dependency, scope="request")])
    async def endpoint() -> None:
        timeline.append("returned")

    async with lifespan(app):
        await request(app, "/", on_send=timeline.on_send)
        await observed.all_over()

    assert timeline[:4] == ["returned", "route, early", START, BODY]
    assert timeline[4:6] == ["response, early", "closing"]
    assert sorted(timeline[6:]) == ["response, late", "route, late"]


@both_kinds
async def test_a_request_has_one_scheduler(kind: Kind, app: FastAPI) -> None:
    """Endpoint, dependencies, their dependencies and every set of scopes get the same one."""
    seen: list[TasksScheduler] = []

    @kind
    def inner(tasks: Tasks) -> None:
        seen.append(tasks)

    of_inner, of_its_own = Depends(inner), Depends(get_tasks, use_cache=False)

    @kind
    def outer(tasks: Tasks, inner: Any = of_inner) -> None:
        seen.append(tasks)

    @kind
    def secured(scopes: SecurityScopes, tasks: Tasks) -> None:
        seen.append(tasks)

    def uncached(tasks: Any = of_its_own) -> None:
        seen.append(tasks)

    dependencies = [
        Depends(outer),
        Depends(uncached),
        Depends(inner, scope="function"),
        Security(secured, scopes=["read"]),
        Security(secured, scopes=["read", "lend"]),
    ]

    @app.get("/", dependencies=dependencies)
    @kind
    def endpoint(tasks: Tasks) -> None:
        seen.append(tasks)

    async with lifespan(app):
        await request(app, "/")
        assert len(seen) == 7
        assert len({id(tasks) for tasks in seen}) == 1
        await request(app, "/")

    assert len({id(tasks) for tasks in seen}) == 2

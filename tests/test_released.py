"""What ``docs/migrating.rst`` says of code for the package 0.1.0 of the same name, run here.

What that package does in its place was seen from outside and is not tested.
"""

import contextlib
import contextvars
import re
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, WebSocket
from fastapi.exceptions import ResponseValidationError
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Message

from fastapi_tasks import InvalidTaskError, Task, Tasks, add_tasks, get_supervisor

from . import asgi
from .clocks import FAKE_CLOCKS, Backend
from .conftest import BACKENDS

on_fake_clocks = pytest.mark.parametrize("anyio_backend", FAKE_CLOCKS, indirect=True)


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Backend:
    """The event loop of each test, made anew where it has a fake clock."""
    return request.param() if callable(request.param) else request.param


async def ask(app: ASGIApp, request: str, **options: Any) -> asgi.Exchange:
    """Start an app, send a request like ``GET /``, let nothing be busy any more, and stop it.

    :raises Exception: what the app raises of the request, not in a group
    """
    method, path = request.split()
    outcome: asgi.Exchange | Exception
    async with asgi.lifespan(app):
        try:
            outcome = await asgi.request(app, path, method=method, **options)
        except Exception as error:
            outcome = error
        await anyio.wait_all_tasks_blocked()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged, as levels and the first words."""
    caplog.set_level("WARNING")
    return lambda: [
        f"{record.levelname} {record.name}: {re.sub(r' [(][0-9a-f]{8}-[0-9]+[)]', '', message)}"
        for record in caplog.records
        for message in [record.getMessage()]
    ]


async def fail() -> None:
    """Fail."""
    raise ConnectionError("no signal")


async def note(done: list[str], what: str) -> None:
    """Write down what was done."""
    done.append(what)


async def test_code_for_0_1_0_runs_here() -> None:
    """All that its documentation shows, in the words that it uses."""
    app = FastAPI()
    add_tasks(app)
    told: list[str] = []

    async def note(what: str) -> None:
        told.append(what)

    async def tell(task: Task, error: Exception) -> None:
        told.append(f"{task.config.name}: {error}")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        begun = tasks.schedule(note, "now")
        tasks.after_route.schedule(note, "after_route")
        tasks.after_response.schedule(note, "after_response")
        tasks.task(name="weak", shield=True, on_error=tell).schedule(fail)
        await begun.started.wait()

    await ask(app, "GET /")
    assert sorted(told) == ["after_response", "after_route", "now", "weak: no signal"]


@on_fake_clocks
@pytest.mark.parametrize("shield", [False, True])
async def test_an_app_without_settings_stops_as_with_0_1_0(shield: bool) -> None:
    """Unshielded tasks are cancelled at once, shielded ones are waited for, and then it closes."""
    happened: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        happened.append("closed")

    app = FastAPI(lifespan=lifespan)
    add_tasks(app)

    async def work() -> None:
        try:
            await anyio.sleep(3600)
            happened.append("done")
        except anyio.get_cancelled_exc_class():
            happened.append("cancelled")
            raise

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.task(shield=shield).schedule(work)

    await ask(app, "GET /")
    assert happened == ["done" if shield else "cancelled", "closed"]


@on_fake_clocks
async def test_an_error_handler_harms_nobody(records: Callable[[], list[str]]) -> None:
    """Neither one that raises, nor one that runs the task again, which fails again."""
    app = FastAPI()
    add_tasks(app, grace=10)
    done: list[str] = []

    async def sibling() -> None:
        await anyio.sleep(1)
        done.append("sibling")

    async def leave() -> None:
        sys.exit(3)

    async def again(task: Task, error: Exception) -> None:
        done.append("again")
        await task()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.schedule(sibling)
        tasks.task(on_error=again).schedule(fail)
        tasks.task(name="leaves").schedule(leave)

    assert (await ask(app, "GET /")).status == 200
    assert done == ["again", "sibling"]
    assert len(records()) == 3


@on_fake_clocks
async def test_the_error_handler_of_a_shielded_task_is_shielded() -> None:
    """A shutdown waits for it, too."""
    app = FastAPI()
    add_tasks(app)
    done: list[str] = []

    async def tell(task: Task, error: Exception) -> None:
        await anyio.sleep(3600)
        done.append("told")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.task(shield=True, on_error=tell).schedule(fail)

    await ask(app, "GET /")
    assert done == ["told"]


variable = contextvars.ContextVar("variable", default="unset")


async def test_a_task_sees_the_variables_of_its_schedule() -> None:
    """Whatever is set before its moment comes."""
    app = FastAPI()
    add_tasks(app, grace=10)
    seen: list[str] = []

    async def look() -> None:
        seen.append(variable.get())

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        variable.set("scheduled")
        tasks.after_response.schedule(look)
        variable.set("later")

    await ask(app, "GET /")
    assert seen == ["scheduled"]


async def test_after_route_has_started_when_the_value_cannot_be_serialized() -> None:
    """The endpoint has returned."""
    app = FastAPI()
    add_tasks(app, grace=10)
    done: list[str] = []

    async def note() -> None:
        done.append("after_route")

    @app.get("/")
    async def endpoint(tasks: Tasks) -> int:
        tasks.after_route.schedule(note)
        return "no number"  # type: ignore[return-value]

    with pytest.raises(ResponseValidationError):
        await ask(app, "GET /")
    assert done == ["after_route"]


async def test_tasks_start_before_background_tasks() -> None:
    """Those wait for one another only."""
    app = FastAPI()
    add_tasks(app, grace=10)
    done: list[str] = []

    async def note(what: str) -> None:
        done.append(what)

    @app.get("/")
    async def endpoint(background: BackgroundTasks, tasks: Tasks) -> None:
        background.add_task(note, "background")
        tasks.after_response.schedule(note, "task")

    await ask(app, "GET /")
    assert done == ["task", "background"]


async def test_an_endpoint_that_raises_loses_both_and_ours_are_named(
    records: Callable[[], list[str]],
) -> None:
    """Unless a task asks to be run in any case."""
    app = FastAPI()
    add_tasks(app, grace=10)
    done: list[str] = []

    @app.get("/")
    async def endpoint(background: BackgroundTasks, tasks: Tasks) -> None:
        background.add_task(note, done, "background")
        tasks.after_response.task(name="lost").schedule(note, done, "task")
        tasks.after_response.task(run_if="always").schedule(note, done, "always")
        raise HTTPException(400)

    assert (await ask(app, "GET /")).status == 400
    assert done == ["always"]
    (record,) = records()
    assert record.startswith("WARNING fastapi_tasks: Task lost was dropped: the request failed")


async def test_a_client_that_leaves_takes_background_tasks_with_it_and_no_tasks() -> None:
    """In the middle of a stream."""
    app = FastAPI()
    add_tasks(app, grace=10)
    done: list[str] = []

    async def parts() -> AsyncIterator[str]:
        yield "first"

    @app.get("/")
    async def endpoint(background: BackgroundTasks, tasks: Tasks) -> StreamingResponse:
        background.add_task(note, done, "background")
        tasks.after_response.schedule(note, done, "task")
        return StreamingResponse(parts())

    async def on_send(message: Message) -> None:
        if message.get("body"):
            raise OSError("the client has gone")

    with contextlib.suppress(Exception):
        await ask(app, "GET /", on_send=on_send)
    assert done == ["task"]


@pytest.mark.parametrize("kind", ["background", "tasks"])
async def test_background_tasks_use_the_threads_of_endpoints_and_tasks_do_not(kind: str) -> None:
    """A function that is not ``async`` runs in a thread either way."""
    app = FastAPI()
    add_tasks(app, grace=10)
    taken: list[float] = []

    def look() -> None:
        limiter = anyio.from_thread.run_sync(anyio.to_thread.current_default_thread_limiter)
        taken.append(limiter.borrowed_tokens)

    @app.get("/")
    async def endpoint(background: BackgroundTasks, tasks: Tasks) -> None:
        if kind == "background":
            background.add_task(look)
        else:
            tasks.after_response.schedule(look)

    await ask(app, "GET /")
    assert taken == [1 if kind == "background" else 0]


async def test_a_call_is_refused_with_the_line_to_write() -> None:
    """``create_task`` takes one, ``schedule`` takes the function."""
    app = FastAPI()
    add_tasks(app)
    async with asgi.lifespan(app):
        call: Any = fail()
        with pytest.raises(InvalidTaskError, match=re.escape("schedule(fail, ...)")):
            get_supervisor(app).schedule(call)
        call.close()


def test_a_websocket_takes_tasks() -> None:
    """As an endpoint does."""
    app = FastAPI()
    add_tasks(app, grace=10)
    done: list[str] = []

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, tasks: Tasks) -> None:
        await websocket.accept()
        tasks.schedule(note, done, "task")
        await websocket.close()

    with TestClient(app) as client, client.websocket_connect("/"):
        pass
    assert done == ["task"]

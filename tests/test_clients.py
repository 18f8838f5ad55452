"""A client may leave at any point: no task is lost by it, none runs twice, and it has no say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress

import anyio
import pytest
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from fastapi_tasks import RunIf, TaskEventKind, Tasks, TasksScheduler

from .asgi import OnSend, lifespan, request
from .endpoints import AddStream, Kind, both_kinds, every_stream
from .recording import Observed, let_others_run
from .servers import PATIENCE

RUN_IF: tuple[RunIf, ...] = ("success", "error", "always")

SUCCEEDED = ["now", "response: always", "response: success", "route: always", "route: success"]
FAILED = ["now", "response: always", "response: error", "route: always", "route: error"]

RAN_TO_ITS_END = [TaskEventKind.SCHEDULED, TaskEventKind.STARTED, TaskEventKind.FINISHED]
NEVER_BEGAN = [TaskEventKind.SCHEDULED, TaskEventKind.DROPPED]

every_server = pytest.mark.parametrize(
    "tells", ["refuses to send", "sends into the void", "does both"]
)
asgi_versions = pytest.mark.parametrize("spec_version", ["2.3", "2.4"])

# FastAPI and Starlette do not close the generator of a response that was cut off, as trio notices.
cuts_off = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")


class Counted(list[str]):
    """The tasks of a request that have run, each as often as it has."""

    def schedule(self, tasks: TasksScheduler) -> None:
        """Schedule one for each moment and outcome."""
        tasks.schedule(self._run, "now")
        for run_if in RUN_IF:
            tasks.after_route.task(run_if=run_if).schedule(self._run, f"route: {run_if}")
            tasks.after_response.task(run_if=run_if).schedule(self._run, f"response: {run_if}")

    async def _run(self, what: str) -> None:
        await let_others_run()  # one that runs twice does so at the same time
        self.append(what)


@pytest.fixture
def ran() -> Counted:
    """Which tasks have run."""
    return Counted()


def accounts(observed: Observed) -> list[list[TaskEventKind]]:
    """Return what became of each task that was scheduled."""
    return [
        observed.kinds(event.task)
        for event in observed.events
        if event.kind is TaskEventKind.SCHEDULED
    ]


async def assert_done_once(observed: Observed, ran: Counted, expected: list[str]) -> None:
    """Check that some tasks ran, once each, and that each of the others was dropped, once."""
    await observed.all_over()
    assert sorted(ran) == expected
    told = accounts(observed)
    assert told.count(RAN_TO_ITS_END) == len(expected)
    assert told.count(NEVER_BEGAN) == len(told) - len(expected)


def leaving(at: int, tells: str, gone: anyio.Event) -> OnSend:
    """Return how a server behaves whose client leaves when it is sent a certain message."""
    sent = 0

    async def on_send(message: Message) -> None:
        nonlocal sent
        await let_others_run()
        if sent == at and tells != "refuses to send":
            gone.set()
        sent += 1
        if sent > at and tells != "sends into the void":
            raise OSError("broken pipe")

    return on_send


async def _three_parts() -> AsyncIterator[str]:
    for part in ("one", "two", "three"):
        yield part
        await let_others_run()


@cuts_off
@every_stream
@asgi_versions
@every_server
@pytest.mark.parametrize("at", range(6))
async def test_a_client_that_leaves_a_stream_decides_nothing(
    at: int,
    tells: str,
    spec_version: str,
    add_stream: AddStream,
    app: FastAPI,
    observed: Observed,
    ran: Counted,
) -> None:
    """Before the first part, between any two, before the end, or after it.

    An endpoint that yields has not begun before the first part, and then has scheduled nothing.
    """
    gone = anyio.Event()
    add_stream(app.router, ran.schedule, _three_parts)

    async with lifespan(app):
        with (
            suppress(OSError, ClientDisconnect, ExceptionGroup),
            anyio.fail_after(PATIENCE),
        ):
            await request(
                app,
                "/",
                on_send=leaving(at, tells, gone),
                disconnected=gone,
                spec_version=spec_version,
            )
        assert accounts(observed) or at == 0
        await assert_done_once(observed, ran, SUCCEEDED if accounts(observed) else [])


@both_kinds
@every_server
@pytest.mark.parametrize("at", range(3))
async def test_a_client_that_leaves_before_it_has_its_answer_decides_nothing(
    at: int, tells: str, kind: Kind, app: FastAPI, observed: Observed, ran: Counted
) -> None:
    """Before its head, before its body, or with all of it."""
    gone = anyio.Event()

    @app.get("/")
    @kind
    def endpoint(tasks: Tasks) -> str:
        ran.schedule(tasks)
        return "booked in"

    async with lifespan(app):
        with suppress(OSError):
            await request(app, "/", on_send=leaving(at, tells, gone), disconnected=gone)
        await assert_done_once(observed, ran, SUCCEEDED)


@every_server
async def test_a_client_that_leaves_while_the_endpoint_runs_decides_nothing(
    tells: str, app: FastAPI, observed: Observed, ran: Counted
) -> None:
    """The endpoint goes on to its end, and so does everything that it has scheduled."""
    gone = anyio.Event()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> str:
        ran.schedule(tasks)
        gone.set()
        await let_others_run()
        return "booked in"

    async with lifespan(app):
        with suppress(OSError):
            await request(app, "/", on_send=leaving(0, tells, gone), disconnected=gone)
        await assert_done_once(observed, ran, SUCCEEDED)


async def _gone() -> Message:
    return {"type": "http.disconnect"}


async def test_a_client_that_leaves_before_its_request_is_there_has_asked_for_nothing(
    app: FastAPI, observed: Observed, ran: Counted
) -> None:
    """FastAPI reads the body before it takes ``Tasks``, so there is nothing to be dropped."""

    @app.post("/")
    async def endpoint(body: dict[str, str], tasks: Tasks) -> None:
        ran.schedule(tasks)

    async def cut_off(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, _gone, send)

    async with lifespan(app):
        assert (await request(cut_off, "/", method="POST")).status == 400
        assert accounts(observed) == []
        json = {"content-type": "application/json"}
        assert (await request(app, "/", method="POST", body=b"{}", headers=json)).status == 200
        await assert_done_once(observed, ran, SUCCEEDED)


async def test_an_endpoint_that_misses_its_client_has_failed_like_any_other(
    app: FastAPI, observed: Observed, ran: Counted
) -> None:
    """It reads the body itself, and raises: what waited for its success is dropped, once."""

    @app.post("/")
    async def endpoint(connection: Request, tasks: Tasks) -> None:
        ran.schedule(tasks)
        await connection.body()

    async def cut_off(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, _gone, send)

    async with lifespan(app):
        with pytest.raises(ClientDisconnect):
            await request(cut_off, "/", method="POST")
        await assert_done_once(observed, ran, FAILED)

"""Requests that are still open when the app shuts down: what becomes of what waits in them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.types import Message

from fastapi_tasks import DrainReport, TaskConfig, Tasks, TasksScheduler, add_tasks

from .asgi import lifespan, request
from .clocks import on_fake_clocks  # noqa: F401 - it is this module's anyio_backend
from .recording import Observed, Timeline

SHIELD = TaskConfig(shield=True)


def report_of(observed: Observed) -> DrainReport:
    """Return what came of the drain, which has finished."""
    (report,) = (event.report for event in observed.events if event.report is not None)
    return report


async def hold_on(message: Message) -> None:
    """Be a client that takes the first of the response, and never the rest."""
    if message["type"] == "http.response.body":
        await anyio.sleep_forever()


async def shut_down_during_a_request(app: FastAPI, **options: Any) -> None:
    """Shut an app down while a request is open, as a server that has lost its patience does."""
    async with anyio.create_task_group() as server, lifespan(app) as served:
        server.start_soon(lambda: request(app, "/", **options))
        await anyio.wait_all_tasks_blocked()
        await served.shutdown()
        server.cancel_scope.cancel()


@pytest.mark.parametrize("grace", [0, 10])
async def test_a_response_that_the_server_has_given_up_is_over(
    observed: Observed, timeline: Timeline, grace: float
) -> None:
    """What waited for it starts, and is then treated like any other task at shutdown."""
    app = FastAPI()
    add_tasks(app, observers=[observed], grace=grace)

    async def work(name: str) -> None:
        await anyio.sleep(3)
        timeline.append(name)

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.task(SHIELD).schedule(work, "shielded")
        tasks.after_response.schedule(work, "unshielded")

    await shut_down_during_a_request(app, on_send=hold_on)

    report = report_of(observed)
    if grace:
        assert sorted(timeline) == ["shielded", "unshielded"]
        assert (len(report.finished), report.never_started) == (2, ())
    else:
        assert timeline == ["shielded"]
        assert (len(report.finished), len(report.never_started)) == (1, 1)


async def test_an_endpoint_that_was_interrupted_has_time_to_say_so(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The server has cancelled it and waits no longer, but the app's drain does."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_response.task(run_if="error", shield=True).schedule(timeline.note, "refunded")
        tasks.after_response.task(SHIELD).schedule(timeline.note, "charged")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(2)
            timeline.append("interrupted")

    async with anyio.create_task_group() as group, lifespan(app) as served:
        async with anyio.create_task_group() as server:
            server.start_soon(request, app, "/")
            await anyio.wait_all_tasks_blocked()
            server.cancel_scope.cancel()
            group.start_soon(served.shutdown)
        await anyio.wait_all_tasks_blocked()

    assert timeline == ["interrupted", "refunded"]
    report = report_of(observed)
    assert [task.config.run_if for task in report.finished] == ["error"]
    assert [task.config.run_if for task in report.never_started] == [None]
    assert report.duration == pytest.approx(2)


async def test_what_waits_for_an_endpoint_that_does_not_end_is_dropped_with_a_record(
    app: FastAPI, observed: Observed, timeline: Timeline, caplog: pytest.LogCaptureFixture
) -> None:
    """After the five seconds that everything has to end, shielded tasks too: none can begin."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.after_route.task(name="index", shield=True).schedule(timeline.note, "index")
        tasks.after_response.task(name="mail").schedule(timeline.note, "mail")
        await anyio.sleep_forever()

    await shut_down_during_a_request(app)

    assert timeline == []
    report = report_of(observed)
    assert [task.name for task in report.never_started] == ["index", "mail"]
    assert report.duration == pytest.approx(5)
    records = [record.getMessage() for record in caplog.records]
    assert [record.split()[:4] for record in records] == [
        ["Task", name, f"({task.id})", "was"]
        for name, task in zip(["index", "mail"], report.never_started, strict=True)
    ]
    assert all("shut down before the moment" in record for record in records)


async def test_what_such_an_endpoint_schedules_later_holds_nothing_up(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """The drain ends with the last task that runs, and not with the request."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        tasks.task(SHIELD).schedule(anyio.sleep, 20)
        await anyio.sleep(10)
        tasks.after_response.schedule(timeline.note, "late")
        await anyio.sleep_forever()

    await shut_down_during_a_request(app)

    assert report_of(observed).duration == pytest.approx(20, abs=1)


async def test_a_stream_for_which_nothing_waits_holds_nothing_up(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """A drain waits for tasks, not for clients."""

    async def forever() -> AsyncIterator[str]:
        while True:
            yield "tick"
            await anyio.sleep_forever()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> StreamingResponse:
        tasks.schedule(timeline.note, "now")
        return StreamingResponse(forever())

    await shut_down_during_a_request(app)

    assert report_of(observed).duration == 0


async def test_what_is_asked_for_late_starts_at_once_if_the_server_is_done(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """Though the endpoint returned, and its response began, when the app was shutting down."""

    async def ask_late(tasks: TasksScheduler) -> None:
        await anyio.sleep(15)
        tasks.after_response.task(SHIELD).schedule(timeline.note, "late")

    async def forever() -> AsyncIterator[str]:
        yield "tick"
        await anyio.sleep_forever()

    @app.get("/")
    async def endpoint(tasks: Tasks) -> StreamingResponse:
        tasks.task(SHIELD).schedule(ask_late, tasks)
        await anyio.sleep(10)
        return StreamingResponse(forever())

    await shut_down_during_a_request(app)

    assert timeline == ["late"]
    assert report_of(observed).duration == pytest.approx(15, abs=1)


async def test_a_drain_ends_when_a_request_drops_what_has_waited(
    app: FastAPI, observed: Observed, timeline: Timeline
) -> None:
    """No task begins then whose end would end it."""

    @app.get("/")
    async def endpoint(tasks: Tasks) -> None:
        unfit = tasks.after_response.task(run_if="error", shield=True)
        unfit.schedule(timeline.note, "an error")
        await anyio.sleep(3)

    await shut_down_during_a_request(app)

    assert timeline == []
    assert report_of(observed).duration == pytest.approx(3, abs=1)

"""Tasks of every kind, many at once, that go on until the server stops, on every event loop.

What happens to them is noted in a file, which outlives the process and which all workers share.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request

from fastapi_tasks import TaskEvent, TaskEventKind, Tasks, add_tasks, task

from .telling import resource, tell

EVENTS = os.open(os.environ["EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(who: str, what: str) -> None:
    """Add an event to the file, in one piece."""
    os.write(EVENTS, f"{os.getpid()} {who} {what} {resource.state}\n".encode())


stopping = anyio.Event()
stopping_for_threads = threading.Event()


def watch(event: TaskEvent) -> None:
    """Let the tasks go on that wait for the shutdown."""
    if event.kind is TaskEventKind.DRAIN_STARTED:
        stopping.set()
        stopping_for_threads.set()


async def lost(who: str) -> None:
    """Go on until it is cancelled."""
    note(who, "started")
    try:
        await anyio.sleep_forever()
    finally:
        note(who, "cancelled")


@task(shield=True)
async def kept(who: str) -> None:
    """Go on for a while after the others were cancelled."""
    note(who, "started")
    await stopping.wait()
    await anyio.sleep(0.1)
    note(who, "finished")


def lost_in_thread(who: str) -> None:
    """Go on in a thread, which nobody can cancel."""
    note(who, "started")
    assert stopping_for_threads.wait(60)
    note(who, "finished")


@task(shield=True)
def kept_in_thread(who: str) -> None:
    """Do the same, and never be cancelled."""
    lost_in_thread(who)


@task(shield=True)
async def patient(seconds: float) -> None:
    """Take some time after the shutdown has begun."""
    note("patient", "started")
    try:
        await stopping.wait()
        tell("patient takes its time")
        await anyio.sleep(seconds)
        note("patient", "finished")
    except BaseException:
        note("patient", "cancelled")
        raise


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Hold the resource open while the app runs."""
    resource.state = "open"
    note("lifespan", "opened")
    yield
    resource.state = "closed"
    note("lifespan", "ended")


def make_app(**settings: Any) -> FastAPI:
    """Return an app.

    :param settings: for ``add_tasks``
    """
    app = FastAPI(lifespan=lifespan)
    add_tasks(app, observers=[watch], **settings)

    @app.get("/work/{number}")
    async def work(number: int, tasks: Tasks) -> int:
        for moment, batch in (
            ("now", tasks),
            ("after_route", tasks.after_route),
            ("after_response", tasks.after_response),
        ):
            batch.schedule(kept, f"{number}.{moment}.kept")
            batch.schedule(kept_in_thread, f"{number}.{moment}.kept_in_thread")
            batch.schedule(lost, f"{number}.{moment}.lost")
            batch.schedule(lost_in_thread, f"{number}.{moment}.lost_in_thread")
        return number

    @app.get("/patient/{seconds}")
    async def be_patient(seconds: float, tasks: Tasks) -> None:
        await tasks.schedule(patient, seconds).started.wait()

    @app.post("/held")
    async def held(request: Request, tasks: Tasks) -> str:
        tasks.after_response.schedule(kept, "held.after_response.kept")
        tell("held")
        return (await request.body()).decode()

    return app


app = make_app()
brief = make_app(shutdown_timeout=0.4)

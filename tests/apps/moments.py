"""Endpoints of each kind, whose tasks go on until they are released."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator

import anyio
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, field_serializer

from fastapi_tasks import Tasks, add_tasks

from .telling import TellingWhenSent, tell

api = FastAPI()
add_tasks(api)
app = TellingWhenSent(api)

released = anyio.Event()


class Receipt(BaseModel):
    """A response model that tells when it is serialized."""

    number: int = 1

    @field_serializer("number")
    def tell_of_it(self, number: int) -> int:
        """Serialize the number."""
        tell("serialized")
        return number


async def work(name: str, started: threading.Event | None = None) -> None:
    """Start, and do not end before the test says so."""
    tell(f"{name} started")
    if started is not None:
        started.set()
    await released.wait()
    tell(f"{name} finished")


@api.get("/coroutine")
async def coroutine(tasks: Tasks) -> Receipt:
    """Return when the immediate task has started."""
    tasks.after_response.schedule(work, "after_response")
    tasks.after_route.schedule(work, "after_route")
    task = tasks.schedule(work, "now")
    await task.started.wait()
    tell("returning")
    return Receipt()


@api.get("/function")
def function(tasks: Tasks) -> Receipt:
    """Return, in a thread, when the immediate task has started."""
    tasks.after_response.schedule(work, "after_response")
    tasks.after_route.schedule(work, "after_route")
    started = threading.Event()
    tasks.schedule(work, "now", started)
    assert started.wait(10)
    tell("returning")
    return Receipt()


@api.get("/stream")
async def stream(tasks: Tasks) -> StreamingResponse:
    """Return a stream, whose first part is made after the endpoint has returned."""
    tasks.after_response.schedule(work, "after_response")
    tasks.after_route.schedule(work, "after_route")
    task = tasks.schedule(work, "now")
    await task.started.wait()

    def parts() -> Generator[bytes]:
        tell("serialized")
        yield b"part"

    tell("returning")
    return StreamingResponse(parts())


@api.get("/prompt")
async def prompt(tasks: Tasks) -> Receipt:
    """Return without ever having left the event loop to others."""
    tasks.schedule(work, "now")
    tell("returning")
    return Receipt()


@api.get("/background")
async def background(tasks: Tasks, background_tasks: BackgroundTasks) -> None:
    """Have FastAPI run a task of its own that goes on until ours has started."""
    started = anyio.Event()

    async def start() -> None:
        started.set()

    async def wait_for_ours() -> None:
        await started.wait()
        tell("background task finished")

    background_tasks.add_task(wait_for_ours)
    tasks.after_response.schedule(start)


@api.get("/release")
async def release() -> None:
    """Let all tasks go on to their end."""
    released.set()


@api.get("/endless")
async def endless(tasks: Tasks) -> StreamingResponse:
    """Stream a first part, and then nothing more without ever coming to an end."""
    tasks.after_response.schedule(work, "after_response")

    async def parts() -> AsyncGenerator[bytes]:
        yield b"first part"
        await anyio.sleep_forever()

    return StreamingResponse(parts())


@api.get("/ticking")
async def ticking(tasks: Tasks) -> StreamingResponse:
    """Stream the same part again and again, without ever coming to an end."""
    tasks.after_response.schedule(work, "after_response")

    async def parts() -> AsyncGenerator[bytes]:
        while True:
            yield b"first part"
            await anyio.sleep(0.05)

    return StreamingResponse(parts())


async def leave() -> None:
    """Ask for the end of the process, as a command-line tool would."""
    raise SystemExit(3)


@api.get("/leave")
async def leaving(tasks: Tasks) -> None:
    """Start a task that must not take the server with it."""
    tasks.schedule(leave)


@api.get("/leave-together")
async def leaving_together(tasks: Tasks) -> None:
    """Wait for such a task, from one of asyncio's."""
    await asyncio.create_task(tasks.schedule(leave).wait())

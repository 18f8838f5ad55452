"""Tasks that run when the server is told to stop, and that end only if it does so properly."""

from __future__ import annotations

import asyncio
import sys
import threading

import anyio.to_thread
from fastapi import FastAPI

from fastapi_tasks import Tasks, add_tasks, get_supervisor, task

from .telling import lifespan, resource, tell

app = FastAPI(lifespan=lifespan)
add_tasks(app)

lost_is_over = asyncio.Event()
lost_is_over_for_threads = threading.Event()


async def lost() -> None:
    """Go on until it is cancelled."""
    tell("lost started")
    try:
        await asyncio.Event().wait()
    finally:
        tell(f"lost cancelled while the resource is {resource.state}")
        lost_is_over.set()
        lost_is_over_for_threads.set()


@task(shield=True)
async def kept() -> None:
    """Go on while the others are cancelled."""
    tell("kept started")
    await lost_is_over.wait()
    tell(f"kept finished while the resource is {resource.state}")


@task(shield=True)
def kept_in_thread() -> None:
    """Go on in a thread while the others are cancelled."""
    tell("kept_in_thread started")
    assert lost_is_over_for_threads.wait(10)
    tell(f"kept_in_thread finished while the resource is {resource.state}")


@app.get("/work")
async def work(tasks: Tasks) -> None:
    """Start one task of each kind, each at another moment."""
    tasks.schedule(lost)
    tasks.after_route.schedule(kept_in_thread)
    tasks.after_response.schedule(kept)


@task(shield=True)
async def kept_with_follow_up() -> None:
    """Find more to do when the server is already stopping."""
    tell("kept_with_follow_up started")
    await lost_is_over.wait()
    get_supervisor().schedule(lost)
    get_supervisor().schedule(kept)


@app.get("/follow-up")
async def follow_up(tasks: Tasks) -> None:
    """Start a task that schedules others while the server stops."""
    tasks.schedule(lost)
    tasks.schedule(kept_with_follow_up)


@app.get("/held")
async def held(tasks: Tasks) -> str:
    """Respond when the test writes a line to standard input."""
    lost_is_over.set()
    tell("held")
    await anyio.to_thread.run_sync(sys.stdin.readline)
    tasks.after_response.schedule(kept)
    return "answered"

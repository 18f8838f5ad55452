"""Tasks that take longer to end than their app is allowed to."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

from fastapi_tasks import Tasks, add_tasks, task

from .telling import lifespan, resource, tell

app = FastAPI(lifespan=lifespan)
add_tasks(app, shutdown_timeout=0.4)


async def stubborn() -> None:
    """Go on whatever happens."""
    tell("stubborn started")
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            tell("stubborn goes on")


@app.get("/stubborn")
async def start_stubborn(tasks: Tasks) -> None:
    """Start a task that takes no notice of its cancellation."""
    tasks.schedule(stubborn)


@task(shield=True)
async def long() -> None:
    """Go on until it is cancelled, shielded as it is."""
    tell("long started")
    try:
        await asyncio.Event().wait()
    finally:
        tell(f"long cancelled while the resource is {resource.state}")


@app.get("/long")
async def start_long(tasks: Tasks) -> None:
    """Start a task that the app would have to wait for without end."""
    tasks.schedule(long)

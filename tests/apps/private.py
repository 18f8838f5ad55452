"""Tasks with a secret, in an event loop and a log that tell all they know."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI

from fastapi_tasks import Tasks, add_tasks
from tests.private import COROUTINES, schedule

logging.basicConfig(level=logging.DEBUG)


@asynccontextmanager
async def talkative(app: FastAPI) -> AsyncGenerator[None, None]:
    """Run the app in asyncio's debug mode, which calls every callback slow and shows it."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = -1
    yield
    loop.set_debug(False)


app = FastAPI(debug=True, lifespan=talkative)
add_tasks(app)


async def end_well() -> None:
    """Be the fate of a task that ends."""


async def fail() -> None:
    """Be the fate of a task that does not end well."""
    raise ConnectionError("no signal")


@app.get("/well")
async def well(tasks: Tasks) -> None:
    """Have tasks that succeed at each moment."""
    for moment in (tasks, tasks.after_route, tasks.after_response):
        schedule(moment, end_well)


@app.get("/badly")
async def badly(tasks: Tasks) -> None:
    """Have tasks that fail at each moment."""
    for moment in (tasks, tasks.after_route, tasks.after_response):
        schedule(moment, fail)


@app.get("/raises")
async def raises(tasks: Tasks) -> None:
    """Have tasks that are dropped."""
    schedule(tasks.after_response, end_well)
    raise ConnectionError("no signal")


@app.get("/slowly")
async def slowly(tasks: Tasks) -> None:
    """Have tasks that the shutdown cancels, once they have begun."""
    for task in schedule(tasks, anyio.sleep_forever, COROUTINES):
        await task.started.wait()

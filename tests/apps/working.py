"""An engine in memory whose worker enqueues its own jobs, and tells on standard output of them.

What jobs there are is in the environment variable ``JOBS``, by the names of the functions below.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread

from fastapi_tasks import EngineUnavailableError, TaskEvent, current_task
from tests.engines.memory import MemoryEngine


@asynccontextmanager
async def resources() -> AsyncGenerator[None, None]:
    """Enqueue the jobs, when the engine is connected."""
    for name in os.environ.get("JOBS", "").split():
        await engine.enqueue(globals()[name])
    print("opened", flush=True)
    yield
    print("closed", flush=True)


engine = MemoryEngine(lifespan=resources)
unused = MemoryEngine()
number = 42


@asynccontextmanager
async def unavailable() -> AsyncGenerator[None, None]:
    """Be a place that cannot be reached."""
    raise EngineUnavailableError("memory", "nobody remembers", instead="Remind somebody")
    yield


@asynccontextmanager
async def broken() -> AsyncGenerator[None, None]:
    """Be a resource that cannot be opened."""
    raise LookupError("no key for the safe")
    yield


@asynccontextmanager
async def endless() -> AsyncGenerator[None, None]:
    """Be a resource that is never open."""
    print("opening", flush=True)
    yield await anyio.sleep_forever()


unreachable = MemoryEngine(lifespan=unavailable)
failing = MemoryEngine(lifespan=broken)
starting = MemoryEngine(lifespan=endless)


@unreachable.task
async def never() -> None:
    """Be a job of an engine that cannot be reached."""


failing.task(name="never-either")(lambda: None)
starting.task(name="not-yet")(lambda: None)


def observe(event: TaskEvent) -> None:
    """Tell what happens."""
    for task in event.tasks:
        print(event.kind, task.name, flush=True)


@engine.task(name="quick")
async def quick() -> None:
    """Succeed."""
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    print("ran", current_task().name, "on", loop, flush=True)


@engine.task(name="bad")
async def bad() -> None:
    """Fail."""
    raise LookupError("nothing there")


@engine.task(name="patient")
async def patient() -> None:
    """Run until somebody says something on standard input."""
    print("patient", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.readline)
    print("patient is done", flush=True)


@engine.task(name="endless_job")
async def endless_job() -> None:
    """Run until somebody cuts it off."""
    print("endless", flush=True)
    await anyio.sleep_forever()


@engine.task(name="brittle")
async def brittle() -> None:
    """Fail if somebody cuts it off."""
    print("brittle", flush=True)
    try:
        await anyio.sleep_forever()
    except asyncio.CancelledError:
        raise LookupError("broken") from None


@engine.task(name="stuck")
def stuck() -> None:
    """Hold a thread for ever."""
    print("stuck", flush=True)
    threading.Event().wait()

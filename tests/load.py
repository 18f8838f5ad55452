"""Many requests with tasks of every fate, and a census of what they leave behind."""

from __future__ import annotations

import functools
import gc
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

import anyio
import anyio.lowlevel
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message

from fastapi_tasks import Supervisor, Task, TaskObserver, Tasks, add_tasks, get_supervisor

from . import asgi
from .recording import idle
from .servers import PATIENCE

PEERS = 10
"""How many requests are under way at once."""


class DroppedError(Exception):
    """What goes wrong with some of the freight."""


async def carry(what: object = None) -> object:
    """Succeed, a bit later."""
    await anyio.lowlevel.checkpoint()
    return what


def carry_in_thread(what: object = None) -> object:
    """Succeed in a thread."""
    return what


async def drop(what: object = None) -> None:
    """Fail, a bit later."""
    await anyio.lowlevel.checkpoint()
    raise DroppedError(what)


async def drop_all(what: object = None) -> None:
    """Fail with a group of errors."""
    raise ExceptionGroup("all", [DroppedError(what), DroppedError(what)])


def drop_in_thread(what: object = None) -> None:
    """Fail in a thread."""
    raise DroppedError(what)


async def wait() -> None:
    """Run until somebody cancels it."""
    await anyio.Event().wait()


async def cancel(task: Task) -> None:
    """Cancel a task that runs."""
    await task.started.wait()
    task.cancel()


async def pick_up(task: Task, error: Exception) -> None:
    """Try again, in vain."""
    with suppress(DroppedError, ExceptionGroup):
        await task()


def pick_up_in_thread(task: Task, error: Exception) -> None:
    """Handle an error in a thread."""


def succeed(tasks: Tasks) -> None:
    """Schedule what goes well."""
    tasks.schedule(carry, "now")
    tasks.after_route.schedule(carry, "after the route")
    tasks.after_response.schedule(carry, "after the response")


def use_threads(tasks: Tasks) -> None:
    """Schedule what runs in threads."""
    tasks.schedule(carry_in_thread, "now")
    tasks.after_route.task(on_error=pick_up_in_thread).schedule(drop_in_thread, "after the route")
    tasks.after_response.task(on_error=pick_up).schedule(drop_in_thread, "after the response")


def fail(tasks: Tasks) -> None:
    """Schedule what fails, with error handlers and without."""
    tasks.schedule(drop, "now")
    tasks.after_route.task(on_error=pick_up).schedule(drop, "after the route")
    tasks.after_response.task(on_error=pick_up).schedule(drop_all, "after the response")


def be_cancelled(tasks: Tasks) -> None:
    """Schedule what is cancelled, while it waits for its moment, before its start, and later."""
    tasks.schedule(cancel, tasks.schedule(wait))
    tasks.schedule(wait).cancel()
    tasks.after_response.schedule(carry).cancel()


def be_dropped(tasks: Tasks) -> None:
    """Schedule what is dropped, since the endpoint fails, and what is not."""
    succeed(tasks)
    tasks.after_response.task(run_if="error").schedule(drop, "after the error")
    raise HTTPException(409)


def crash(tasks: Tasks) -> None:
    """Do the same with an error that nobody handles."""
    succeed(tasks)
    tasks.after_route.task(run_if="always").schedule(carry, "after the error")
    raise DroppedError("the endpoint")


class Chunks:
    """A stream that schedules while it is sent; a generator would have to be closed."""

    def __init__(self, tasks: Tasks) -> None:
        self._left = ["three", "two", "one"]
        self._tasks = tasks

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if not self._left:
            raise StopAsyncIteration
        self._tasks.after_response.schedule(carry, self._left[-1])
        return self._left.pop()


FATES: dict[str, Callable[[Tasks], None]] = {
    fate.__name__: fate for fate in (succeed, fail, be_cancelled, be_dropped, crash, use_threads)
}


def port(*observers: TaskObserver) -> FastAPI:
    """Return an app whose requests have the fate that their path names."""
    app = FastAPI()
    add_tasks(app, threads=2, observers=observers)

    @app.get("/ship/{fate}")
    async def ship(fate: str, tasks: Tasks) -> str:
        FATES[fate](tasks)
        return fate

    @app.get("/ship-in-thread/{fate}")
    def ship_in_thread(fate: str, tasks: Tasks) -> str:
        FATES[fate](tasks)
        return fate

    @app.get("/stream/{fate}")
    async def stream(fate: str, tasks: Tasks) -> StreamingResponse:
        FATES[fate](tasks)
        return StreamingResponse(Chunks(tasks))

    return app


PATHS = [
    "/ship/succeed",
    "/ship/fail",
    "/stream/succeed",
    "/ship/be_cancelled",
    "/ship/succeed",
    "/ship/be_dropped",
    "/stream/fail",
    "/ship/crash",
    "/stream/be_cancelled",
    "/ship/succeed",
]
"""What every ten requests ask for; the third, the seventh and the last one lose their clients."""

PATHS_IN_THREADS = ["/ship/use_threads", "/ship-in-thread/fail"]
"""What every hundredth request asks for, in the place of the above."""


async def stay(message: Message) -> None:
    """Be a client that gets all."""


async def leave(message: Message) -> None:
    """Be a client that leaves before it has got a body."""
    if message["type"] == "http.response.body":
        raise OSError


async def send_requests(app: FastAPI, count: int) -> None:
    """Send requests to an app, and wait until all of their tasks are over."""
    for first in range(0, count, 100):
        numbers = iter(range(first, first + 100))
        async with anyio.create_task_group() as group:
            for _ in range(PEERS):
                group.start_soon(_be_client, app, numbers)
        await idle(get_supervisor(app))


async def _be_client(app: FastAPI, numbers: Iterator[int]) -> None:
    for number in numbers:
        path = PATHS[number % 10]
        if number % 100 in (1, 2):
            path = PATHS_IN_THREADS[number % 100 - 1]
        on_send = leave if number % 10 in (2, 6, 9) else stay
        # Older Starlettes stream in a task group.
        with suppress(DroppedError, OSError, ClientDisconnect, ExceptionGroup):
            await asgi.request(app, path, on_send=on_send)


@contextmanager
def silence() -> Iterator[None]:
    """Let the package's log have a handler that keeps nothing, and no other one."""
    logger, nowhere = logging.getLogger("fastapi_tasks"), logging.NullHandler()
    logger.addHandler(nowhere)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(nowhere)


async def cycle(supervisor: Supervisor, count: int) -> None:
    """Start a supervisor again and again, each time for some tasks that are seen to their end."""
    for number in range(count):
        with anyio.fail_after(PATIENCE):
            async with supervisor:
                supervisor.task(shield=True).schedule(carry, number)
                supervisor.task(shield=True, on_error=pick_up).schedule(drop, number)
                supervisor.schedule(wait)


def census() -> Counter[str]:
    """Count the objects that are alive, by their type."""
    return Counter(
        f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects()
    )


async def growth(work: Callable[[int], Awaitable[None]], count: int) -> dict[str, int]:
    """Do some work without the garbage collector, and return what it leaves, of each type.

    :param work: is given how much there is to do, and does a little before the counting begins
    :param count: how much
    """
    with silence():
        await work(200)
        gc.collect()
        before = census()
        gc.disable()
        try:
            await work(count)
            # A worker thread lets go of its last call a moment after the event loop has got the
            # result, so that one look may come too early.
            looks: list[Counter[str]] = []
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
                looks.append(census() - before)
            return min(looks, key=Counter.total)
        finally:
            gc.enable()


async def growth_of_requests(count: int) -> dict[str, int]:
    """Return what requests with tasks leave behind, of each type.

    :param count: how many
    """
    app = port()
    async with asgi.lifespan(app):
        return await growth(functools.partial(send_requests, app), count)


async def growth_of_cycles(count: int) -> dict[str, int]:
    """Return what starts and drains leave behind, of each type.

    :param count: how many
    """
    return await growth(functools.partial(cycle, Supervisor()), count)

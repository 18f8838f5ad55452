"""What contenders are measured against: FastAPI and the event loop themselves."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
from fastapi import BackgroundTasks

from .contender import Endpoint, Function


async def bare() -> int:
    """Answer, and no more."""
    return 1


def bare_in_thread() -> int:
    """Answer in a thread, and no more."""
    return 1


def background(function: Function, count: int, *, takes_turn: bool = False) -> Endpoint:
    """Return an endpoint with ``BackgroundTasks``.

    :param takes_turn: whether it waits for a turn of the event loop, as one that asks a database
        does: several requests are then under way at once, and the garbage collector comes
    """

    async def endpoint(background: BackgroundTasks) -> int:
        for number in range(count):
            background.add_task(function, number)
        if takes_turn:
            await asyncio.sleep(0)
        return 1

    return endpoint


class RawTasks:
    """``asyncio.create_task`` with what it takes for a task not to be lost."""

    def __init__(self) -> None:
        self.live: set[asyncio.Task[Any]] = set()

    def endpoint(
        self,
        function: Callable[[int], Coroutine[Any, Any, Any]],
        count: int,
        *,
        takes_turn: bool = False,
    ) -> Endpoint:
        """Return an endpoint that makes tasks.

        :param takes_turn: whether it lets them begin before it returns
        """

        async def endpoint() -> int:
            for number in range(count):
                task = asyncio.create_task(function(number))
                self.live.add(task)
                task.add_done_callback(self.live.discard)
            if takes_turn:
                await asyncio.sleep(0)
            return 1

        return endpoint

    async def cancel(self) -> None:
        """Cancel the tasks that are live, and wait for their ends."""
        tasks = list(self.live)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def raw_threads(function: Function, count: int, *, own_limiter: bool = False) -> Endpoint:
    """Return an endpoint that waits for calls in threads.

    :param own_limiter: whether they have 40 threads to themselves, and do not share those of sync
        endpoints
    """

    async def endpoint() -> int:
        limiter = anyio.CapacityLimiter(40) if own_limiter else None
        run_sync = functools.partial(anyio.to_thread.run_sync, limiter=limiter)
        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(run_sync, function, number)
        return 1

    return endpoint

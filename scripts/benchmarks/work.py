"""What the tasks of the benchmark do: next to nothing, but so that it is seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeAlias

AsyncFunction: TypeAlias = Callable[[int], Coroutine[Any, Any, None]]

PATIENCE = 60.0
"""Seconds after which a side is given up whose tasks do not run."""

TURNS = 10_000
TURNS_OF_ENDS = 3
"""How often the event loop comes round for the ends of tasks, after the last one has run."""


class TasksDidNotRunError(Exception):
    """A side's tasks have not done what they should, so that its time says nothing."""

    def __init__(self, ran: int, expected: int, what: str = "have run") -> None:
        super().__init__(f"{ran} of {expected} tasks {what}")


class Work:
    """The functions that tasks run, and how many have.

    :param expected: how many shall
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.ran: list[int] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._loop = asyncio.get_running_loop()
        self._all_ran = asyncio.Event()

    # Plain functions and no methods, as what users schedule.

    @cached_property
    def work(self) -> AsyncFunction:
        """What notes that it has run."""
        ran = self.ran

        async def work(number: int) -> None:
            ran.append(number)

        return work

    @cached_property
    def wait(self) -> AsyncFunction:
        """What notes that it has begun, and waits, for nothing that it shares with others."""
        ran, waiting, create_future = self.ran, self._waiting, self._loop.create_future

        async def wait(number: int) -> None:
            ran.append(number)
            future = create_future()
            waiting.append(future)
            await future

        return wait

    @cached_property
    def work_in_thread(self) -> Callable[[int], None]:
        """What notes that it has run in a thread."""
        ran = self.ran

        def work(number: int) -> None:
            ran.append(number)
            if len(ran) >= self.expected:
                self._loop.call_soon_threadsafe(self._all_ran.set)

        return work

    @cached_property
    def block(self) -> Callable[[int], None]:
        """What blocks a thread for 30 to 70 ms: not all the same, so that none go in step."""
        note = self.work_in_thread

        def block(number: int) -> None:
            time.sleep(0.03 + 0.04 * (number * 617 % 1000) / 1000)
            note(number)

        return block

    @property
    def is_done(self) -> bool:
        """Whether all tasks have run."""
        return len(self.ran) >= self.expected

    async def finish(self) -> None:
        """Wait until all tasks have run, and the event loop has seen their ends.

        :raises TasksDidNotRunError: they do not, or more than they should
        """
        for _ in range(TURNS):
            if self.is_done:
                break
            await asyncio.sleep(0)
        for _ in range(TURNS_OF_ENDS):
            await asyncio.sleep(0)
        self._check()

    async def let_go(self) -> None:
        """Let tasks end that wait, and the event loop see it."""
        for future in self._waiting:
            future.set_result(None)
        for _ in range(TURNS_OF_ENDS):
            await asyncio.sleep(0)

    def check_cancelled(self) -> None:
        """Do nothing if every task that waited was cancelled.

        :raises TasksDidNotRunError: it was not
        """
        cancelled = sum(future.cancelled() for future in self._waiting)
        if cancelled != self.expected:
            raise TasksDidNotRunError(cancelled, self.expected, "were cancelled")

    async def finish_in_threads(self) -> None:
        """Do the same for tasks in threads, without keeping the event loop busy.

        :raises TasksDidNotRunError: they do not run, or more than they should
        """
        with suppress(TimeoutError):  # what has run is looked at below
            async with asyncio.timeout(PATIENCE):
                await self._all_ran.wait()
        for _ in range(TURNS_OF_ENDS):
            await asyncio.sleep(0)
        self._check()

    def _check(self) -> None:
        if len(self.ran) != self.expected:
            raise TasksDidNotRunError(len(self.ran), self.expected)

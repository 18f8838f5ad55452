"""What happened, in which order, from whichever thread."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest
from starlette.types import Message

from fastapi_tasks import Supervisor, Task, TaskEvent, TaskEventKind, current_task

from .servers import PATIENCE

START, BODY = "http.response.start", "http.response.body"
"""The messages of a response, as a timeline has them."""


class Observed:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []

    def __call__(self, event: TaskEvent) -> None:
        self.events.append(event)

    def kinds(self, task: Task | None = None) -> list[TaskEventKind]:
        """Return what happened, to one task or altogether."""
        return [e.kind for e in self.events if task is None or task in e.tasks]

    async def all_over(self) -> None:
        """Wait until every task that was scheduled is over."""
        with anyio.fail_after(10):  # a task that got lost is to fail one test, not to stop all
            for event in tuple(self.events):
                if event.kind is TaskEventKind.SCHEDULED:
                    await event.task.wait()


class Timeline(list[str]):
    """What happened, in order, in the words of those who say so."""

    async def note(self, what: str) -> None:
        """Be a task that says something and ends."""
        self.append(what)

    async def on_send(self, message: Message) -> None:
        """Note a message to the server, and let everybody else have a turn before it is sent."""
        self.append(message["type"])
        await let_others_run()


async def let_others_run() -> None:
    """Give every task that can run the time for its next step."""
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that a thread does, and let no time pass on a fake clock."""
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def idle(supervisor: Supervisor) -> None:
    """Wait until nothing runs any more, error handlers included."""
    with anyio.fail_after(PATIENCE):
        while supervisor.running:
            await anyio.lowlevel.checkpoint()


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the package's own records."""
    return [record for record in caplog.records if record.name == "fastapi_tasks"]


def collect_within_a_task() -> None:
    """Collect what is lost while a task runs, which is the current one before and after."""

    async def collect() -> Task:
        gc.collect()
        return current_task()

    async def main() -> None:
        async with Supervisor() as supervisor:
            task = supervisor.schedule(collect)
            assert await task.wait() is task

    asyncio.run(main())

"""Tasks that have a secret, each in another way, and one fate."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass

import anyio.from_thread
from pydantic import BaseModel

from fastapi_tasks import BoundTasks, Task, task

# Short, since asyncio shows the first thirty characters of what it shows.
SECRET = "hunter2"
"""What nobody may see."""


@dataclass
class Till:
    """Something whose repr tells all."""

    code: str

    async def charge(self) -> object:
        """Be a coroutine method."""
        return await take(self)

    def count(self) -> object:
        """Be a method for a thread."""
        return take_in_thread(self)

    async def __call__(self) -> object:
        """Be what is scheduled."""
        return await take(self)


class Printer(Till):
    """Something whose call is for a thread."""

    def __call__(self) -> object:  # type: ignore[override]
        """Be what is scheduled."""
        return take_in_thread(self)


class Order(BaseModel):
    """Another thing whose repr tells all."""

    code: str


Fate = Callable[[], Awaitable[object]]
"""What happens to a task when it runs."""

_fate: ContextVar[Fate] = ContextVar("fate")
_till: ContextVar[Till] = ContextVar("till")


async def take(*args: object, **kwargs: object) -> object:
    """Meet a fate with a secret among the local variables, and return it if that is possible."""
    till = Till(SECRET)
    await _fate.get()()
    return till


def take_in_thread(*args: object, **kwargs: object) -> object:
    """Do the same in a thread."""
    till = Till(SECRET)
    anyio.from_thread.run(_fate.get())
    return till


@task(name="charge")
async def take_as_configured(*args: object) -> object:
    """Do the same under another name."""
    return await take(*args)


ScheduleOne = Callable[[BoundTasks], Task]

COROUTINES: list[ScheduleOne] = [
    lambda tasks: tasks.schedule(take, SECRET, Order(code=SECRET)),
    lambda tasks: tasks.schedule(take, code=SECRET, till=Till(SECRET)),
    lambda tasks: tasks.schedule(take_as_configured, SECRET),
    lambda tasks: tasks.schedule(functools.partial(take, SECRET, code=SECRET)),
    lambda tasks: tasks.task(name="charge").schedule(functools.partial(take, SECRET)),
    lambda tasks: tasks.schedule(Till(SECRET)),
    lambda tasks: tasks.schedule(Till(SECRET).charge),
]
THREADS: list[ScheduleOne] = [
    lambda tasks: tasks.schedule(take_in_thread, SECRET, till=Till(SECRET)),
    lambda tasks: tasks.schedule(functools.partial(take_in_thread, code=SECRET)),
    lambda tasks: tasks.schedule(Printer(SECRET)),
    lambda tasks: tasks.schedule(Till(SECRET).count),
    lambda tasks: tasks.schedule(lambda code=SECRET: take(code)),
]
EVERY = COROUTINES + THREADS


def schedule(tasks: BoundTasks, fate: Fate, how: Iterable[ScheduleOne] = EVERY) -> list[Task]:
    """Schedule tasks that have the secret.

    :param fate: is awaited by each of them
    :param how: in which ways they have it
    """
    _fate.set(fate)
    _till.set(Till(SECRET))  # a context variable is one of the ways
    return [schedule_one(tasks) for schedule_one in how]

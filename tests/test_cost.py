"""What tasks and requests cost, counted: a change that makes them dearer is seen without a clock.

Where a figure here has to grow, say why in the change that makes it grow. Those that are named in
words hold exactly. How many functions are entered is a ceiling, which all versions of Python and
FastAPI reach that the tests run on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, FastAPI

from fastapi_tasks import Supervisor, TaskConfig, Tasks, TasksScheduler, add_tasks

from . import asgi
from .counting import Cost, census, counted, run, turns

MANY = 100
KNOWN = (
    "fastapi_tasks.Task",
    "_asyncio.Task",
    "_contextvars.Context",
    "builtins.coroutine",
)
TURNS = 1
"""How often the event loop has to come round for tasks that never wait."""


async def work(number: int = 0) -> None:
    """Do nothing, and be awaited for it."""


def log_error(task: object, error: Exception) -> None:
    """Be an error handler, which no task here needs."""


def cost_of_tasks(schedule: Callable[[TasksScheduler], object]) -> Cost:
    """Count what a number of tasks cost, from their scheduling to their ends."""

    async def main() -> Cost:
        config = TaskConfig(on_error=log_error)
        async with Supervisor(config=config) as supervisor:
            tasks = TasksScheduler(supervisor)
            schedule(tasks)  # and do what is done once for a function
            await turns(TURNS)
            with counted() as cost:
                for _ in range(MANY):
                    schedule(tasks)
                await turns(TURNS)
        return cost

    return run(main())


def test_a_task_is_one_callback_of_the_event_loop() -> None:
    """As with a bare ``asyncio.Task`` that tells nobody of its end."""
    cost = cost_of_tasks(lambda tasks: tasks.schedule(work))

    assert cost.callbacks == MANY + TURNS


def test_a_sync_task_takes_no_more_turns_than_its_thread() -> None:
    """As many as a bare ``asyncio.Task`` in which AnyIO is asked for a thread."""

    def work_in_thread() -> None:
        """Do nothing, in a thread."""

    async def main() -> tuple[Cost, Cost]:
        async with Supervisor() as supervisor:
            await supervisor.schedule(work_in_thread).wait()  # its thread is used from now on
            with counted() as ours:
                for _ in range(MANY):
                    await supervisor.schedule(work_in_thread).wait()
            with counted() as bare:
                for _ in range(MANY):
                    await asyncio.create_task(anyio.to_thread.run_sync(work_in_thread))
        return ours, bare

    ours, bare = run(main())
    assert ours.callbacks == bare.callbacks > MANY


def test_a_task_copies_its_context_once() -> None:
    """And sets one variable in it."""
    cost = cost_of_tasks(lambda tasks: tasks.schedule(work))

    assert cost.builtins["copy_context"] == MANY
    assert cost.builtins["Context.copy"] == 0
    assert cost.builtins["ContextVar.set"] == MANY


def test_a_task_makes_no_event_until_somebody_looks() -> None:
    """One that is asked whether it has started has one, so that they are counted at all."""
    assert cost_of_tasks(lambda tasks: tasks.schedule(work)).events == 0
    assert cost_of_tasks(lambda tasks: tasks.schedule(work).started).events >= MANY


@pytest.mark.parametrize(
    ("schedule", "calls"),
    [
        pytest.param(lambda tasks: tasks.schedule(work), 12, id="plain"),
        pytest.param(lambda tasks: tasks.schedule(work, 1), 12, id="with-an-argument"),
        pytest.param(lambda tasks: tasks.task(shield=True).schedule(work), 21, id="shielded"),
    ],
)
def test_a_task_enters_few_functions_of_the_package(
    schedule: Callable[[TasksScheduler], object], calls: int
) -> None:
    """Each costs about a tenth of a microsecond."""
    cost = cost_of_tasks(schedule)

    assert 0 < sum(cost.calls.values()) <= calls * MANY, cost.calls


def test_a_live_task_is_made_of_few_objects() -> None:
    """No event, lock, scope or group of tasks: what nobody asks for is not there."""

    async def main() -> dict[str, float]:
        end = asyncio.Event()

        async def wait(number: int) -> None:
            await end.wait()

        async with Supervisor() as supervisor:
            tasks = TasksScheduler(supervisor)
            tasks.schedule(wait, 0)
            await asyncio.sleep(0)
            before = census()
            for number in range(MANY):
                tasks.schedule(wait, number)
            await asyncio.sleep(0)
            more = census() - before
            end.set()
        return {name: round(count / MANY) for name, count in more.items() if count >= MANY}

    objects = run(main())

    assert {name: objects.get(name) for name in KNOWN} == {
        "fastapi_tasks.Task": 1,
        "_asyncio.Task": 1,
        "_contextvars.Context": 1,
        "builtins.coroutine": 3,  # the runner's, the function's and that of Event.wait()
    }
    assert not [name for name in objects if name.startswith(("anyio.", "asyncio.", "threading."))]


# Requests


def app_with(endpoint: Callable[..., Any]) -> FastAPI:
    """Return an app with tasks and one endpoint."""
    app = FastAPI()
    add_tasks(app)
    app.get("/")(endpoint)
    return app


def cost_of_requests(app: FastAPI) -> Cost:
    """Count what a number of requests cost, one after the other, tasks included."""

    async def main() -> Cost:
        async with asgi.lifespan(app):
            await asgi.request(app, "/")
            await turns(TURNS)
            with counted() as cost:
                for _ in range(MANY):
                    await asgi.request(app, "/")
                    await turns(TURNS)
        return cost

    return run(main())


async def bare() -> int:
    """Answer, and no more."""
    return 1


async def with_background(background: BackgroundTasks) -> int:
    """Answer, and have FastAPI do something."""
    background.add_task(work, 1)
    return 1


async def take(tasks: Tasks) -> int:
    """Take tasks, and have none."""
    return 1


async def now(tasks: Tasks) -> int:
    """Have a task for now."""
    tasks.schedule(work, 1)
    return 1


async def after_route(tasks: Tasks) -> int:
    """Have a task for the end of the route."""
    tasks.after_route.schedule(work, 1)
    return 1


async def after_response(tasks: Tasks) -> int:
    """Have a task for the end of the response."""
    tasks.after_response.schedule(work, 1)
    return 1


@pytest.mark.parametrize(
    ("endpoint", "callbacks"),
    [(bare, 0), (with_background, 0), (take, 0), (now, 2), (after_route, 2), (after_response, 1)],
)
def test_a_request_gives_the_loop_nothing_but_its_tasks(
    endpoint: Callable[..., Any], callbacks: int
) -> None:
    """One callback for each, and one for the turn in which tasks start before the response."""
    assert cost_of_requests(app_with(endpoint)).callbacks == (callbacks + TURNS) * MANY


@pytest.mark.parametrize(
    ("endpoint", "calls"),
    [(bare, 5), (take, 15), (now, 32), (after_route, 35), (after_response, 30)],
)
def test_a_request_enters_few_functions_of_the_package(
    endpoint: Callable[..., Any], calls: int
) -> None:
    """FastAPI itself enters about 150 for a bare request."""
    cost = cost_of_requests(app_with(endpoint))

    assert 0 < sum(cost.calls.values()) <= calls * MANY, cost.calls


@pytest.mark.parametrize(
    ("endpoint", "tasks"), [(bare, 0), (take, 0), (now, 1), (after_route, 1), (after_response, 1)]
)
def test_a_request_copies_contexts_for_its_tasks_only_and_makes_no_event(
    endpoint: Callable[..., Any], tasks: int
) -> None:
    """Nor does FastAPI in any of these requests."""
    cost = cost_of_requests(app_with(endpoint))

    assert cost.builtins["copy_context"] == tasks * MANY
    assert cost.events == 0

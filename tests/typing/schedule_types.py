"""What type checkers make of the public API; never run, checked by ``make lint``.

Lines with ``type: ignore`` must be errors: the checkers complain about ignores without one.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable
from datetime import datetime, timedelta
from typing import Any, assert_type

from fastapi import FastAPI

from fastapi_tasks import (
    BoundTasks,
    DrainReport,
    Progress,
    Retry,
    Supervisor,
    Task,
    TaskConfig,
    TaskErrorHandler,
    TaskEvent,
    TaskInfo,
    Tasks,
    TaskStatus,
    add_tasks,
    current_task,
    get_supervisor,
    task,
)


class Parcel:
    pass


async def weigh(parcel: Parcel, *, precise: bool = False) -> float:
    return 1.0 if precise else 0.9


def label(parcel: Parcel, copies: int) -> str:
    return "x" * copies


def ship(parcel: Parcel) -> Awaitable[int]:
    raise NotImplementedError


class Scale:
    async def weigh(self, parcel: Parcel) -> float:
        return 1.0

    async def __call__(self, parcel: Parcel) -> float:
        return 1.0


@task(shield=True)
async def charge(order_id: int) -> Parcel:
    return Parcel()


@task(TaskConfig(name="bill"))
def bill(order_id: int) -> bytes:
    return b""


async def the_types_of_a_call_go_into_its_task(tasks: Tasks, parcel: Parcel) -> None:
    weighing = tasks.schedule(weigh, parcel, precise=True)
    assert_type(await weighing.wait(), float)
    assert_type(weighing.result(), float)
    assert_type(await weighing(), float)
    assert_type(tasks.schedule(label, parcel, 2).result(), str)
    assert_type(tasks.schedule(ship, parcel).result(), int)
    assert_type(tasks.schedule(Scale().weigh, parcel).result(), float)
    assert_type(tasks.schedule(Scale(), parcel).result(), float)
    assert_type(tasks.schedule(functools.partial(label, parcel), copies=2).result(), str)
    assert_type(tasks.after_route.schedule(weigh, parcel).result(), float)
    assert_type(tasks.after_response.schedule(label, parcel, copies=1).result(), str)
    assert_type(weighing.status, TaskStatus)
    assert_type(weighing.info(), TaskInfo)
    assert_type(weighing.info().finished, datetime | None)
    assert_type(weighing.progress, Progress | None)
    weighing.set_progress(1, total=2.5, message="on the scale")
    weighing.set_progress("half")  # type: ignore[arg-type]
    assert_type(tasks.supervisor.recent, tuple[TaskInfo, ...])
    assert_type(tasks.supervisor.find(weighing.id), TaskInfo | None)
    assert_type(tasks.supervisor.cancel(weighing.id), bool)
    tasks.supervisor.cancel(weighing)  # type: ignore[arg-type]
    assert_type(weighing.exception(), BaseException | None)


async def they_do_so_with_a_configuration_too(tasks: Tasks, parcel: Parcel) -> None:
    assert_type(tasks.task(shield=True).schedule(weigh, parcel).result(), float)
    assert_type(tasks.after_route.task(name="w").schedule(label, parcel, 1).result(), str)
    assert_type(tasks.task(TaskConfig()).task(name="w").schedule(weigh, parcel).result(), float)
    assert_type(tasks.schedule(charge, 1).result(), Parcel)
    assert_type(tasks.schedule(bill, 1).result(), bytes)
    assert_type(await charge(1), Parcel)


def a_wrong_argument_is_an_error(tasks: Tasks, parcel: Parcel) -> None:
    tasks.schedule(weigh)  # type: ignore[call-overload]
    tasks.schedule(weigh, "a parcel")  # type: ignore[call-overload]
    tasks.schedule(weigh, parcel, precise="very")  # type: ignore[arg-type]
    tasks.schedule(label, parcel, 2, 3)  # type: ignore[call-overload]
    tasks.schedule(charge, "1")  # type: ignore[call-overload]
    tasks.task(shield=True).schedule(label, parcel)  # type: ignore[call-overload]
    tasks.after_response.schedule(weigh, 1)  # type: ignore[call-overload]
    tasks.schedule(42)  # type: ignore[call-overload]
    tasks.task(shield="yes")  # type: ignore[call-overload]
    tasks.task(TaskConfig(), shield=True)  # type: ignore[call-overload]
    TaskConfig(run_if="sometimes")  # type: ignore[arg-type]


async def awaiting_a_task_itself_is_an_error(tasks: Tasks, parcel: Parcel) -> None:
    await tasks.schedule(weigh, parcel)  # type: ignore[misc]


def alert(task: Task, error: Exception) -> None:
    assert_type(task.args, tuple[Any, ...])


async def retry(task: Task, error: Exception) -> None:
    await task()


def one_argument(task: Task) -> None: ...


def handlers_are_checked(tasks: Tasks) -> None:
    handler: TaskErrorHandler = retry
    tasks.task(on_error=alert)
    tasks.task(on_error=handler)
    TaskConfig(on_error=one_argument)  # type: ignore[arg-type]


def observe(event: TaskEvent) -> None: ...


def after_any_error(error: Exception) -> bool:
    return True


def after_a_while(error: Exception) -> timedelta:
    return timedelta(seconds=1)


def after_timeouts(error: TimeoutError) -> bool:
    return True


async def after_asking(error: Exception) -> bool:
    return True


def retries_are_checked(tasks: Tasks) -> None:
    tasks.task(retry=Retry(ConnectionError))
    tasks.after_route.task(retry=Retry(on=(ConnectionError, TimeoutError), attempts=5))
    tasks.after_response.task(retry=Retry(after_any_error, wait_max=timedelta(minutes=1)))
    TaskConfig(retry=Retry(after_a_while, wait_initial=1, wait_jitter=0.5, timeout=60))
    task(retry=Retry(lambda error: 2.5))(weigh)
    assert_type(Retry(ConnectionError).attempts, int)
    Retry()  # type: ignore[call-arg]
    Retry(KeyboardInterrupt)  # type: ignore[arg-type]
    Retry(after_timeouts)  # type: ignore[arg-type]
    Retry(after_asking)  # type: ignore[arg-type]
    Retry(ConnectionError, attempts="many")  # type: ignore[arg-type]
    TaskConfig(retry=ConnectionError)  # type: ignore[arg-type]
    tasks.task(retry=3)  # type: ignore[call-overload]


async def everything_else(app: FastAPI) -> None:
    add_tasks(app, config=TaskConfig(shield=True), observers=[observe], grace=1, threads=4)
    assert_type(get_supervisor(app), Supervisor)
    places: list[BoundTasks] = [get_supervisor(), get_supervisor().task(name="x")]
    places[0].schedule(weigh, Parcel())
    assert_type(await Supervisor().drain(), DrainReport)
    assert_type(current_task(), Task[..., Any])


async def many(count: int) -> AsyncIterator[int]:
    yield count

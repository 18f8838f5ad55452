"""What type checkers make of engines; never run, checked by ``make lint``.

Lines with ``type: ignore`` must be errors: the checkers complain about ignores without one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import assert_type, cast

from fastapi import FastAPI

from fastapi_tasks import Retry, Supervisor, Task, TaskInfo, Tasks, add_tasks
from fastapi_tasks.engines import BoundEngine, Engine, EngineAdapter, Job


class Receipt:
    pass


def as_engine(jobs: EngineAdapter) -> Engine:
    return jobs


async def registering_keeps_the_types(jobs: EngineAdapter) -> None:
    @jobs.task
    async def charge(order_id: int) -> Receipt:
        return Receipt()

    @jobs.task(name="label", retry=Retry(on=OSError), timeout=timedelta(seconds=5), on_error=tell)
    def label(order_id: int, *, copies: int = 1) -> str:
        return ""

    assert_type(await charge(1), Receipt)
    assert_type(label(1, copies=2), str)
    await charge("1")  # type: ignore[arg-type]
    label(1, copy=2)  # type: ignore[call-arg]

    @jobs.task("label")  # type: ignore[call-overload, untyped-decorator]
    def other() -> None:
        pass


async def tell(task: Task, error: Exception) -> None:
    pass


async def charge(order_id: int, *, twice: bool = False) -> Receipt:
    return Receipt()


def label(order_id: int, copies: int) -> str:
    return ""


async def the_types_of_a_call_go_into_its_job(jobs: EngineAdapter) -> None:
    job = await jobs.enqueue(charge, 1, twice=True)
    assert_type(job, Job[Receipt])
    assert_type(await job.wait(), Receipt)
    assert_type(await job.info(), TaskInfo)
    assert_type(await job.cancel(), bool)
    assert_type(job.id, str)
    assert_type(await (await jobs.enqueue(label, 1, copies=2)).wait(), str)
    assert_type(await jobs.find(job.id), TaskInfo | None)
    assert_type(await jobs.cancel(job.id), bool)


async def what_is_scheduled_says_nothing_of_a_job(jobs: EngineAdapter, tasks: Tasks) -> None:
    task = tasks.schedule(charge, 1)
    assert_type(await task.wait(), Receipt)
    assert_type(cast("Job[Receipt]", await task.wait()), Job[Receipt])


async def options_change_no_type(jobs: EngineAdapter) -> None:
    bound = jobs.using(
        key="order-1", delay=3, retry=Retry(on=OSError), timeout=timedelta(minutes=1)
    )
    assert_type(bound, BoundEngine)
    assert_type(await (await bound.enqueue(charge, 1)).wait(), Receipt)
    assert_type(await (await bound.enqueue(label, 1, 2)).wait(), str)


async def wrong_arguments_are_errors(jobs: EngineAdapter) -> None:
    await jobs.enqueue(charge)  # type: ignore[call-overload]
    await jobs.enqueue(charge, "1")  # type: ignore[call-overload]
    await jobs.enqueue(charge, 1, thrice=True)  # type: ignore[call-arg]
    await jobs.enqueue(charge(1))  # type: ignore[call-overload]
    await jobs.using().enqueue(label, 1)  # type: ignore[call-overload]
    jobs.using(key=1)  # type: ignore[arg-type]
    jobs.using(delay="soon")  # type: ignore[arg-type]
    jobs.using(shield=True)  # type: ignore[call-arg]


def a_job_s_type_is_that_of_its_result(job: Job[bool]) -> Job[int]:
    return job


def engines_are_given_to_an_app(app: FastAPI, jobs: EngineAdapter, tasks: Tasks) -> None:
    add_tasks(app, engines=[jobs])
    Supervisor(engines=(jobs,))
    add_tasks(app, engines=jobs)  # type: ignore[arg-type]
    add_tasks(app, engines=[charge])  # type: ignore[list-item]
    tasks.schedule(charge, "1")  # type: ignore[call-overload]


@asynccontextmanager
async def pool() -> AsyncGenerator[int, None]:
    yield 1


class MyEngine(EngineAdapter):
    pass


def an_adapter_has_to_be_complete() -> None:
    MyEngine("my://", lifespan=pool)  # type: ignore[abstract]

"""What the recipes tell, beyond what the blocks of their page show."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import anyio.from_thread
import anyio.to_process
import anyio.to_thread
import pytest
from celery import Celery
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from fastapi_tasks import (
    Supervisor,
    Task,
    TaskCancelledError,
    Tasks,
    TaskStatus,
    get_supervisor,
)

from . import asgi
from .clocks import Backend
from .conftest import ASYNCIO_BACKENDS
from .endpoints import Kind, both_kinds
from .recording import Observed
from .servers import PATIENCE

# Work for another process


class Worker:
    """A process that reads from a pipe until somebody writes into it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipe"
        os.mkfifo(self.path)

    async def begun(self) -> int:
        """Wait until the process reads, and return what to write to."""
        with anyio.fail_after(PATIENCE):
            return await anyio.to_thread.run_sync(os.open, self.path, os.O_WRONLY)

    def schedule(self, supervisor: Supervisor, *, shield: bool = False, **options: Any) -> Task:
        """Let a process read from the pipe."""
        place = supervisor.task(shield=shield)
        return place.schedule(anyio.to_process.run_sync, Path.read_bytes, self.path, **options)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    """A process that is not there yet."""
    return Worker(tmp_path)


def answer(pipe: int) -> None:
    """Write into the pipe, and close it."""
    try:
        os.write(pipe, b"17")
    finally:
        os.close(pipe)


@pytest.mark.parametrize("by", ["cancel", "shutdown"])
async def test_a_cancelled_process_is_killed(
    worker: Worker, by: Literal["cancel", "shutdown"]
) -> None:
    """If it was made ``cancellable``: the task ends, and nobody computes for nobody."""
    async with contextlib.AsyncExitStack() as stack:
        supervisor = await stack.enter_async_context(Supervisor())
        task = worker.schedule(supervisor, cancellable=True)
        pipe = await worker.begun()
        with anyio.fail_after(PATIENCE):
            if by == "cancel":
                task.cancel()
            else:
                await stack.aclose()
            await task.wait()

    assert task.status is TaskStatus.CANCELLED
    with pytest.raises(BrokenPipeError):
        answer(pipe)


async def test_what_becomes_of_a_process_that_is_not_cancellable(
    worker: Worker, anyio_backend: Backend
) -> None:
    """On asyncio it is killed as well. On trio it is waited for."""
    async with Supervisor() as supervisor:
        task = worker.schedule(supervisor)
        pipe = await worker.begun()
        task.cancel()
        if anyio_backend[0] == "trio":
            answer(pipe)
        with anyio.fail_after(PATIENCE):
            await task.wait()

    if anyio_backend[0] == "trio":
        assert task.result() == b"17"
    else:
        assert task.status is TaskStatus.CANCELLED
        with pytest.raises(BrokenPipeError):
            answer(pipe)


async def test_a_shielded_process_ends_by_itself(worker: Worker) -> None:
    """A shutdown waits for it."""
    async with anyio.create_task_group() as group:
        supervisor = Supervisor()
        await supervisor.start()
        task = worker.schedule(supervisor, shield=True, cancellable=True)
        pipe = await worker.begun()
        group.start_soon(supervisor.drain)
        await anyio.wait_all_tasks_blocked()
        assert task.status is TaskStatus.RUNNING
        answer(pipe)

    assert task.result() == b"17"


# One after the other


async def test_a_chain_that_is_shielded_in_part_breaks_at_shutdown() -> None:
    """The step that is not shielded is cut off, and nothing is done without it."""
    loaded: list[object] = []

    async def load(weighing: Task) -> None:
        await weighing.wait()
        loaded.append(weighing.result())

    async with Supervisor() as supervisor:
        weighing = supervisor.schedule(anyio.sleep_forever)
        loading = supervisor.task(shield=True).schedule(load, weighing)
        await loading.started.wait()

    assert weighing.status is TaskStatus.CANCELLED
    assert isinstance(loading.exception(), TaskCancelledError)
    assert loaded == []


# Waiting in a thread


class ScaleError(Exception):
    """What a task raises."""


async def test_a_thread_gets_what_the_task_has_raised(app: FastAPI) -> None:
    """As it would by awaiting it."""
    caught: list[Exception] = []

    async def weigh() -> None:
        raise ScaleError

    @app.get("/")
    def weight(tasks: Tasks) -> None:
        with pytest.raises(ScaleError) as error:
            anyio.from_thread.run(tasks.schedule(weigh).wait)
        caught.append(error.value)

    async with asgi.lifespan(app):
        await asgi.request(app, "/")

    assert [type(error) for error in caught] == [ScaleError]


# A database session for each task


@pytest.mark.parametrize("anyio_backend", ASYNCIO_BACKENDS)
@pytest.mark.parametrize(("scope", "seen"), [("request", [0]), ("function", [1])])
async def test_a_dependency_that_commits_does_so_before_or_after_the_task(
    app: FastAPI,
    observed: Observed,
    tmp_path: Path,
    scope: Literal["request", "function"],
    seen: list[int],
) -> None:
    """It is up to the scope whether a task of ``after_response`` finds the row."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'parcels.db'}")
    make_session = async_sessionmaker(engine)
    found: list[int] = []
    looks: list[Task] = []

    async def committed() -> AsyncIterator[AsyncSession]:
        async with make_session() as session:
            yield session
            if scope == "request":
                await looks[0].wait()  # else it is up to chance who is faster
            await session.commit()

    async def look() -> None:
        async with make_session() as session:
            found.append(len((await session.execute(text("SELECT * FROM parcels"))).all()))

    @app.get("/")
    async def register(
        session: Annotated[AsyncSession, Depends(committed, scope=scope)], tasks: Tasks
    ) -> None:
        looks.append(tasks.after_response.schedule(look))
        await session.execute(text("INSERT INTO parcels VALUES (17)"))

    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE parcels (number INTEGER)"))
    async with asgi.lifespan(app):
        with anyio.fail_after(PATIENCE):
            await asgi.request(app, "/")
        await observed.all_over()
    await engine.dispose()

    assert found == seen


# A task queue that you have


@both_kinds
async def test_a_celery_task_is_sent_on_each_event_loop(
    app: FastAPI, observed: Observed, kind: Kind, request: pytest.FixtureRequest
) -> None:
    """``delay`` runs in a thread, which needs no event loop."""
    queue = Celery("parcels", broker="memory://", set_as_current=False)
    queue.conf.task_default_queue = request.node.name

    @queue.task
    def collect_postage(number: int) -> None:
        """Be done by a worker."""

    def paid(tasks: Tasks) -> None:
        tasks.after_response.schedule(collect_postage.delay, 17)

    app.get("/")(kind(paid))
    async with asgi.lifespan(app):
        await asgi.request(app, "/")
        await observed.all_over()
        assert get_supervisor(app).running == ()

    with queue.connection_for_read() as connection:
        message = connection.SimpleQueue(request.node.name).get(timeout=PATIENCE)
        message.ack()
    assert message.payload[0] == [17]
    queue.close()

"""The worker: PgQueuer hands out jobs, the executor runs them, and what comes of it is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import anyio
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain.models import Context, Job
from pgqueuer.domain.types import JobId

from fastapi_tasks.errors import WorkerLostError
from fastapi_tasks.info import Progress, shown_error
from fastapi_tasks.observer import logger

from .execution import Again, Cancelled, Executor, Failed, Interrupted, Outcome, Succeeded
from .pgqueuer_database import LOST, Database
from .pgqueuer_driver import Listener, SteadyDriver
from .pgqueuer_queries import WorkerQueries
from .pgqueuer_store import ENTRYPOINT, Builders, Statements, interval

__all__ = ["Worker", "WorkerSettings"]

_DEQUEUE_TIMEOUT = timedelta(seconds=1)
"""How often the queue is looked at when nothing is said about it."""
_PAUSE = 1.0
"""Seconds before a worker that has stopped begins again."""
_PRUNE_INTERVAL = 3600.0
_ENDING = 2.0
"""Seconds to store what has come of the last jobs."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a worker works."""

    concurrency: int
    """How many jobs run at once."""
    heartbeat: timedelta
    """After which time without a sign of life a worker is taken for dead."""
    max_deliveries: int
    """How many workers may die of a job, and then as many of its error handler."""
    keep: timedelta
    """How long what is over is kept."""


class Worker:
    """Runs jobs, from entry to :meth:`working` to its exit.

    :param database: where queries are made
    :param listener: hears notifications
    :param builders: what PgQueuer writes its SQL with
    :param executor: what runs jobs
    :param settings: how
    """

    def __init__(
        self,
        database: Database,
        listener: Listener,
        builders: Builders,
        executor: Executor,
        settings: WorkerSettings,
    ) -> None:
        self._database = database
        self._driver = SteadyDriver(database, listener)
        self._statements = Statements(builders.qbe.settings)
        self._queries = WorkerQueries(
            self._driver,
            builders,
            self._statements,
            concurrency=settings.concurrency,
            on_gone=self._stop_gone,
        )
        self._executor = executor
        self._settings = settings
        self._is_paused = asyncio.Event()
        self._manager = self._new_manager()

    def pause(self) -> None:
        """Take no more jobs."""
        self._is_paused.set()
        self._manager.shutdown.set()

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[None, None]:
        """Run jobs, from entry to exit."""
        running = asyncio.create_task(self._run())
        pruning = asyncio.create_task(self._prune())
        try:
            yield
        finally:
            self.pause()
            self._driver.close()
            pruning.cancel()
            await asyncio.wait({running}, timeout=_ENDING)
            if not running.done():
                self._database.terminate()
            await asyncio.wait({running, pruning})

    def _new_manager(self) -> QueueManager:
        manager = QueueManager(self._queries, self._queries.qbe.settings.channel)
        manager.entrypoint(ENTRYPOINT, accepts_context=True)(self._work)
        self._queries.owner = manager.queue_manager_id
        return manager

    async def _run(self) -> None:
        while not self._is_paused.is_set():
            try:
                # With a size of 1 each heartbeat is written at once; jobs are not limited by it.
                await self._manager.run(
                    dequeue_timeout=_DEQUEUE_TIMEOUT,
                    batch_size=1,
                    heartbeat_timeout=self._settings.heartbeat,
                    log_aggregation_interval=timedelta(0),
                )
            except Exception as error:
                if self._is_paused.is_set() and isinstance(error, LOST):
                    return
                logger.exception("The worker has stopped, and begins again in %g s", _PAUSE)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._is_paused.wait(), _PAUSE)
                self._manager = self._new_manager()

    async def _work(self, job: Job, context: Context) -> None:
        try:
            rows = await self._driver.fetch(self._statements.begin, job.id, job.queue_manager_id)
            for row in rows:  # there is none if it is cancelled, or another worker has it by now
                await self._run_begun(str(row["id"]), row["deliveries"], job, context)
        except LOST:
            logger.warning("What has come of job %s in the queue could not be stored", job.id)

    async def _run_begun(self, job_id: str, deliveries: object, job: Job, context: Context) -> None:
        manager = self._manager
        assert isinstance(deliveries, int)
        lost, limit = deliveries - 1, self._settings.max_deliveries
        outcome: Outcome
        if lost < 2 * limit:
            outcome = await self._execute(job_id, job, context, lost if lost >= limit else 0)
        else:
            error = WorkerLostError(lost)
            logger.error("Job %s has failed, and so did its error handler: %s", job_id, error)
            outcome = Failed(*shown_error(error))
        if isinstance(outcome, Again | Interrupted):
            # PgQueuer skips what it takes for running, and the row may come back at once.
            manager.job_context.pop(job.id, None)
        await self._store(job, outcome)

    async def _execute(self, job_id: str, job: Job, context: Context, lost: int) -> Outcome:
        cancelling = asyncio.create_task(self._cancel_with(context.cancellation, job_id))
        try:
            return await self._executor.run(
                job_id,
                job.payload or b"",
                attempt=job.attempts + 1,
                store_progress=partial(self._store_progress, job.id),
                lost=lost,
            )
        finally:
            cancelling.cancel()
            await asyncio.wait({cancelling})

    async def _cancel_with(self, scope: anyio.CancelScope, job_id: str) -> None:
        with scope:
            await anyio.sleep_forever()
        self._executor.cancel(job_id)

    def _stop_gone(self, queue_ids: set[JobId]) -> None:
        contexts = self._manager.job_context
        for queue_id in contexts.keys() & queue_ids:
            contexts[queue_id].cancellation.cancel()

    async def _store(self, job: Job, outcome: Outcome) -> None:
        statements, mine = self._statements, (job.id, job.queue_manager_id)
        match outcome:
            case Succeeded(result):
                await self._driver.fetch(statements.succeed, *mine, result, None, None)
            case Failed(error_type, error):
                told = (_without_nul(error_type), _without_nul(error))
                await self._driver.fetch(statements.fail, *mine, None, *told)
            case Cancelled():
                await self._driver.fetch(statements.drop, *mine, None, None, None)
            case Again(wait):
                await self._requeue(job, wait, job.attempts + 1)
            case _:  # it was interrupted, and burns no attempt
                await self._requeue(job, 0.0, job.attempts)

    async def _requeue(self, job: Job, wait: float, attempts: int) -> None:
        await self._driver.fetch(
            self._statements.requeue, job.id, job.queue_manager_id, interval(wait), attempts
        )

    async def _store_progress(self, queue_id: JobId, progress: Progress) -> None:
        text = progress.model_dump_json()
        await self._driver.fetch(self._statements.note_progress, queue_id, text)

    async def _prune(self) -> None:
        while True:
            try:
                for statement in self._statements.prune:
                    await self._database.fetch(statement, self._settings.keep)
            except Exception:
                logger.warning("What is over for long could not be removed", exc_info=True)
            await asyncio.sleep(_PRUNE_INTERVAL)


def _without_nul(text: str) -> str:
    # PostgreSQL's texts cannot have it.
    return text.replace("\0", "\N{SYMBOL FOR NULL}")

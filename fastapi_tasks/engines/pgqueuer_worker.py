"""The worker: PgQueuer hands out jobs, the executor runs them, and what comes of it is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial

import anyio
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain.models import Context, Job, TracebackRecord
from pgqueuer.domain.types import JOB_STATUS, JobId, QueueEntrypoint, QueueManagerId
from pgqueuer.ports.repository import EntrypointExecutionParameter
from pgqueuer.queries import Queries

from fastapi_tasks.info import Progress
from fastapi_tasks.observer import logger

from .execution import Again, Cancelled, Executor, Failed, Interrupted, Outcome, Succeeded
from .pgqueuer_database import LOST, Database
from .pgqueuer_driver import Listener, SteadyDriver
from .pgqueuer_store import ENTRYPOINT, Builders, Statements, interval

__all__ = ["Worker", "WorkerSettings"]

_DEQUEUE_TIMEOUT = timedelta(seconds=1)
"""How often the queue is looked at when nothing is said about it."""
_PAUSE = 1.0
"""Seconds before a worker that has stopped begins again."""
_PRUNE_INTERVAL = 3600.0
_ENDING = 2.0
"""Seconds to store what has come of the last jobs."""


class WorkerSettings:
    """How a worker works.

    :param concurrency: how many jobs run at once
    :param heartbeat: after which time without a sign of life a worker is taken for dead
    :param max_deliveries: how many workers may die of a job
    :param keep: how long what is over is kept
    """

    __slots__ = ("concurrency", "heartbeat", "keep", "max_deliveries")

    def __init__(
        self, *, concurrency: int, heartbeat: timedelta, max_deliveries: int, keep: timedelta
    ) -> None:
        self.concurrency = concurrency
        self.heartbeat = heartbeat
        self.max_deliveries = max_deliveries
        self.keep = keep


class _WorkerQueries(Queries):
    """PgQueuer's queries, in which a row belongs to the worker that has claimed it, and no other.

    :param driver: by what queries are made
    :param builders: what PgQueuer writes its SQL with
    :param statements: ours
    :param concurrency: how many jobs the worker may have
    :param on_gone: is called with jobs that are not the worker's any more
    """

    def __init__(
        self,
        driver: SteadyDriver,
        builders: Builders,
        statements: Statements,
        *,
        concurrency: int,
        on_gone: Callable[[Iterable[JobId]], None],
    ) -> None:
        super().__init__(driver, builders.qbe, builders.qbq, builders.qbs)
        self.owner: QueueManagerId | None = None
        """Whose jobs get heartbeats."""
        self._statements = statements
        self._concurrency = concurrency
        self._on_gone = on_gone

    async def dequeue(
        self,
        batch_size: int,
        entrypoints: dict[QueueEntrypoint, EntrypointExecutionParameter],
        queue_manager_id: QueueManagerId,
        global_concurrency_limit: int | None,
        heartbeat_timeout: timedelta,
    ) -> list[Job]:
        """Claim jobs, as many as the worker may have more."""
        query = self.qbq.build_dequeue_query(
            batch_size=self._concurrency,
            entrypoints=list(entrypoints),
            concurrency_limits=[0] * len(entrypoints),
            queue_manager_id=queue_manager_id,
            global_concurrency_limit=self._concurrency,
            heartbeat_timeout=heartbeat_timeout,
        )
        rows = await self.driver.fetch(query.sql, *query.args)
        # Headers are not ours, and one that could not be read would end the worker.
        return [Job.model_validate({**row, "headers": None}) for row in rows]

    async def log_jobs(
        self, job_status: list[tuple[Job, JOB_STATUS, TracebackRecord | None]]
    ) -> None:
        """Do nothing: what has come of a job was stored before PgQueuer heard of it.

        What was not, it must not delete either: that job is to run again.
        """

    async def update_heartbeat(self, job_ids: list[JobId]) -> None:
        """Say that jobs are still running here, unless they are cancelled, or run elsewhere."""
        rows = await self.driver.fetch(self._statements.heartbeat, list(set(job_ids)), self.owner)
        self._on_gone(set(job_ids) - {row["id"] for row in rows})


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
        self._queries = _WorkerQueries(
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
        manager = self._manager
        rows = await self._driver.fetch(self._statements.begin, job.id, job.queue_manager_id)
        if not rows:
            return  # it is cancelled, or another worker has it by now
        job_id = str(rows[0]["id"])
        outcome = self._refusal(job_id, rows[0]["deliveries"])
        if outcome is None:
            outcome = await self._execute(job_id, job, context)
        if isinstance(outcome, Again | Interrupted):
            # PgQueuer skips what it takes for running, and the row may come back at once.
            manager.job_context.pop(job.id, None)
        try:
            await self._store(job, outcome)
        except LOST:
            logger.warning("What has come of job %s could not be stored: it runs again", job_id)

    def _refusal(self, job_id: str, deliveries: object) -> Outcome | None:
        limit = self._settings.max_deliveries
        assert isinstance(deliveries, int)
        if deliveries <= limit:
            return None
        logger.error("Job %s was refused: %d workers have died of it", job_id, limit)
        return Failed("TooManyDeliveries", f"{limit} workers have died of it", refused=True)

    async def _execute(self, job_id: str, job: Job, context: Context) -> Outcome:
        cancelling = asyncio.create_task(self._cancel_with(context.cancellation, job_id))
        try:
            return await self._executor.run(
                job_id,
                job.payload or b"",
                attempt=job.attempts + 1,
                store_progress=partial(self._store_progress, job.id),
            )
        finally:
            cancelling.cancel()
            await asyncio.wait({cancelling})

    async def _cancel_with(self, scope: anyio.CancelScope, job_id: str) -> None:
        with scope:
            await anyio.sleep_forever()
        self._executor.cancel(job_id)

    def _stop_gone(self, queue_ids: Iterable[JobId]) -> None:
        for queue_id in queue_ids:
            context = self._manager.job_context.get(queue_id)
            if context is not None:
                context.cancellation.cancel()

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
            case Interrupted():
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

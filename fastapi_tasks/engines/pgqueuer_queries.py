"""PgQueuer's queries, as a worker of ours makes them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from pgqueuer.domain.models import Job, TracebackRecord
from pgqueuer.domain.types import JOB_STATUS, JobId, QueueEntrypoint, QueueManagerId
from pgqueuer.ports.repository import EntrypointExecutionParameter
from pgqueuer.queries import Queries

from .pgqueuer_driver import SteadyDriver
from .pgqueuer_store import Builders, Statements

__all__ = ["WorkerQueries"]


class WorkerQueries(Queries):
    """Queries in which a row belongs to the worker that has claimed it, and no other.

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
        on_gone: Callable[[set[JobId]], None],
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

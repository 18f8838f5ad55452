"""PgQueuer: jobs in PostgreSQL, without another server, and in the user's own transactions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import ClassVar
from urllib.parse import urlsplit

from fastapi_tasks.config import Duration
from fastapi_tasks.errors import EngineUnavailableError, InvalidSettingError
from fastapi_tasks.extras import extra

from .base import EngineAdapter, JobOptions, JobRecord, Lifespan
from .execution import Executor
from .messages import Message
from .settings import check_count, checked_seconds

with extra("pgqueuer", __name__, pgqueuer="pgqueuer", asyncpg="asyncpg"):
    from .pgqueuer_database import REFUSED, Database, Row, end
    from .pgqueuer_driver import Listener
    from .pgqueuer_store import Builders, Statements, install, interval, record_of
    from .pgqueuer_waiting import Waiters
    from .pgqueuer_worker import Worker, WorkerSettings
    from .transactions import fetch_by

__all__ = ["PgQueuerEngine"]

_PREFIX = re.compile("[a-z_][a-z0-9_]{0,29}")  # names have 63 characters at most, with ours
_INSTALLING = 30.0
"""Seconds that may pass until the tables are there."""


class PgQueuerEngine(EngineAdapter):
    """Keeps jobs in PostgreSQL, by way of PgQueuer: https://pgqueuer.readthedocs.io

    :param dsn: the database: ``postgresql://user:password@host:port/name``
    :param prefix: what the names of its tables begin with; ``fastapi_tasks_`` by default
    :param heartbeat_timeout: seconds or ``timedelta`` after which a worker that gives no sign of
        life is taken for dead, and its jobs are given to others; 30 seconds by default
    :param max_deliveries: how many workers may die of a job, before it has failed with a
        ``WorkerLostError``, of which ``on_error`` is told; 3 by default
    :param keep: seconds or ``timedelta`` that jobs are kept, and their keys and results are
        known, when they are over; 7 days by default
    :param connections: how many connections this process has at most; 4 by default
    :param worker: whether this process runs jobs too, and not only enqueues them
    :param concurrency: how many jobs run at once in a process that does; 10 by default
    :param enqueue_timeout: seconds after which an enqueueing has failed that got no answer; 5 by
        default
    :param lifespan: opens what the jobs need, before the first one, and closes it after the last
    :raises InvalidSettingError: one of them has a value that it cannot have
    """

    in_transactions: ClassVar[bool] = True

    def __init__(
        self,
        dsn: str,
        *,
        prefix: str = "fastapi_tasks_",
        heartbeat_timeout: Duration = 30.0,
        max_deliveries: int = 3,
        keep: Duration = timedelta(days=7),
        connections: int = 4,
        worker: bool = False,
        concurrency: int = 10,
        enqueue_timeout: float = 5.0,
        lifespan: Lifespan | None = None,
    ) -> None:
        super().__init__(
            dsn,
            worker=worker,
            concurrency=concurrency,
            enqueue_timeout=enqueue_timeout,
            lifespan=lifespan,
        )
        _check_prefix(prefix)
        check_count(
            "max_deliveries", max_deliveries, instead="PgQueuerEngine(dsn, max_deliveries=1)"
        )
        check_count(
            "connections", connections, least=2, instead="PgQueuerEngine(dsn, connections=2)"
        )
        self._prefix = prefix
        self._heartbeat = _checked("heartbeat_timeout", heartbeat_timeout)
        self._max_deliveries = max_deliveries
        self._keep = _checked("keep", keep)
        self._connections = connections
        self._database: Database
        self._listener: Listener
        self._waiters: Waiters
        self._builders: Builders
        self._statements: Statements
        self._worker: Worker

    def _check_url(self, url: object) -> None:
        schemes = ("postgresql", "postgres")
        if not isinstance(url, str) or urlsplit(url).scheme not in schemes:
            raise InvalidSettingError(
                "dsn",
                None if isinstance(url, str) else url,  # it may have a password
                expected="the address of a PostgreSQL database",
                instead='PgQueuerEngine("postgresql://localhost/jobs")',
            )

    # Connecting, and working

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[None, None]:
        # One connection hears what is said, once somebody listens.
        database = Database(self.url, size=self._connections - 1, timeout=self.enqueue_timeout)
        with self._reaching():
            await database.open()
            connection = await database.connect()
            try:
                async with asyncio.timeout(_INSTALLING):
                    self._builders = await install(connection, self._prefix)
            finally:
                await end(connection)
        self._database = database
        self._statements = Statements(self._builders.qbe.settings)
        self._waiters = Waiters(self._record, self._transaction_status)
        self._listener = Listener(database.connect, self._waiters.wake_all)
        try:
            yield
        finally:
            await self._listener.close()
            await database.close()

    @asynccontextmanager
    async def _working(self, executor: Executor) -> AsyncGenerator[None, None]:
        settings = WorkerSettings(
            concurrency=self.concurrency,
            heartbeat=self._heartbeat,
            max_deliveries=self._max_deliveries,
            keep=self._keep,
        )
        self._worker = Worker(self._database, self._listener, self._builders, executor, settings)
        async with self._worker.working():
            yield

    def _pause(self) -> None:
        self._worker.pause()

    @contextmanager
    def _reaching(self) -> Generator[None, None, None]:
        """Say what it means when the server does not do what it was asked for."""
        try:
            yield
        except REFUSED as error:
            problem = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise EngineUnavailableError(
                str(self),
                f"PostgreSQL cannot be reached, or refuses ({problem})",
                instead="Look whether it runs there, and whether the database exists",
            ) from error

    # What is done with a job

    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        payload = message.model_dump_json().encode()
        call = (self._statements.enqueue, job_id, message.name, payload, interval(options.delay))
        if options.connection is None:
            await self._fetch(*call)
            return job_id
        fetch = await fetch_by(options.connection)
        rows = await fetch(*call)
        for row in rows:  # there is none if there is such a job
            self._waiters.note_uncommitted(job_id, row["transaction"])
        return job_id

    async def _record(self, job_id: str) -> JobRecord | None:
        if not _is_text(job_id):
            return None
        rows = await self._fetch(self._statements.record, job_id)
        return record_of(rows[0]) if rows else None

    async def _cancel(self, job_id: str) -> bool:
        return _is_text(job_id) and bool(await self._fetch(self._statements.cancel, job_id))

    async def _until_over(self, job_id: str) -> JobRecord | None:
        await self._listener.add(self._statements.done, self._waiters.wake)
        return await self._waiters.until_over(job_id)

    async def _transaction_status(self, transaction: str) -> str | None:
        rows = await self._fetch(self._statements.transaction_status, transaction)
        status: str | None = rows[0]["status"]
        return status

    async def _fetch(self, query: str, *args: object) -> list[Row]:
        with self._reaching():
            return await self._database.fetch(query, *args)


def _check_prefix(prefix: object) -> None:
    if not isinstance(prefix, str) or _PREFIX.fullmatch(prefix) is None:
        raise InvalidSettingError(
            "prefix",
            prefix,
            expected="up to 30 small letters, digits and underscores, and no digit first",
            instead='PgQueuerEngine(dsn, prefix="shop_")',
        )


def _checked(setting: str, duration: Duration) -> timedelta:
    """Return a time as PostgreSQL has it.

    :raises InvalidSettingError: it is none, or 0
    """
    instead = f"PgQueuerEngine(dsn, {setting}=30)"
    return interval(checked_seconds(setting, duration, instead=instead))


def _is_text(job_id: str) -> bool:
    """Return whether PostgreSQL can know an id, which may be what a client has sent."""
    try:
        return b"\0" not in job_id.encode()
    except UnicodeEncodeError:
        return False

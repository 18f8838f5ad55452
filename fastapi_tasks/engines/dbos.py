"""DBOS: durable jobs in a SQLite file, without a server, or in PostgreSQL."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from time import monotonic

from fastapi_tasks.config import Duration
from fastapi_tasks.errors import EngineUnavailableError, InvalidSettingError
from fastapi_tasks.extras import extra
from fastapi_tasks.observer import logger

from .base import EngineAdapter, JobOptions, JobRecord, Lifespan
from .execution import Executor
from .messages import Message
from .settings import check_count, checked_seconds

with extra("dbos", __name__, dbos="dbos", psycopg="psycopg", sqlalchemy="sqlalchemy"):
    from .dbos_address import Address
    from .dbos_guards import guarded
    from .dbos_records import is_over, record_of
    from .dbos_store import Store
    from .dbos_waiting import Waiters
    from .dbos_worker import Worker

__all__ = ["DBOSEngine"]

_LOOK = 5.0  # seconds between two looks for processes that have died
_PURGE = 600.0  # seconds between two purges, at most


class DBOSEngine(EngineAdapter):
    """Keeps jobs in a database by means of DBOS, and runs them in the processes of the app.

    ``DBOSEngine("sqlite:///jobs.db")`` needs no server: one host, one file, which the system can
    lock, so not one of a network. ``DBOSEngine("postgresql://localhost/jobs")`` is the same on
    PostgreSQL, which DBOS itself recommends for production, and serves any number of hosts. Each
    process that runs jobs has a number, of which no other one has the same: a lock on a file
    beside a SQLite database, or an advisory lock of a PostgreSQL session. So several hosts need
    nothing but the same URL, ``name`` and ``application_version``; and PostgreSQL itself, or a
    pooler in session mode, since in transaction mode such a lock is nobody's.

    When a process has died, its jobs run again: at its next start, or within some seconds in
    another process that lives. An attempt that was cut off in this way is made again under the
    same number, and so is one that a shutdown has cut off: ``retry`` counts failures only. For
    crashes there is ``max_recoveries``.

    A process runs the jobs of one ``DBOSEngine`` at most, and does not use DBOS otherwise. While
    one is started, nothing that DBOS reads in this process is unpickled.

    :param url: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` or ``postgresql://...``; a
        PostgreSQL database that is not there is made if its user may do that
    :param name: what tells the jobs from those of other apps in the same database: 3 to 100
        lower-case letters, digits, ``-`` and ``_``
    :param application_version: a process runs the jobs that were enqueued under its own version
        only. So it is to change when the jobs that wait must not be run by the new code, and the
        old code is to run on until there are none left of the old version
    :param max_recoveries: how often a job is begun again whose process has died; after that it has
        failed with a ``WorkerLostError``, of which ``on_error`` is told. 3 by default
    :param polling: seconds between two questions for jobs that wait, and for what has become of
        jobs; 0.2 by default. A process begins ``concurrency`` jobs after each, at most
    :param keep: seconds or ``timedelta`` for which a job that is over is remembered, with its
        result and its key; 7 days by default, ``math.inf``: for ever
    :param worker: whether this process runs jobs too; it does by default
    :param concurrency: how many jobs run at once in each process that does: what the one that was
        started last says holds for all. 10 by default
    :param enqueue_timeout: seconds after which an enqueueing has failed that got no answer; 5 by
        default
    :param lifespan: opens what the jobs need, before the first one, and closes it after the last:
        a function decorated with ``asynccontextmanager``
    :raises InvalidSettingError: one of them has a value that it cannot have
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "fastapi-tasks",
        application_version: str = "1",
        max_recoveries: int = 3,
        polling: float = 0.2,
        keep: Duration = timedelta(days=7),
        worker: bool = True,
        concurrency: int = 10,
        enqueue_timeout: float = 5.0,
        lifespan: Lifespan | None = None,
    ) -> None:
        super().__init__(
            url,
            worker=worker,
            concurrency=concurrency,
            enqueue_timeout=enqueue_timeout,
            lifespan=lifespan,
        )
        _check_name(name)
        _check_version(application_version)
        check_count(
            "max_recoveries", max_recoveries, least=0, instead="DBOSEngine(url, max_recoveries=3)"
        )
        self.application_version = application_version
        """Under which jobs are enqueued, and whose jobs are run here."""
        self.max_recoveries = max_recoveries
        """How often a job is begun again whose process has died."""
        self.polling = checked_seconds("polling", polling, instead="DBOSEngine(url, polling=1.0)")
        """Seconds between two questions for jobs that wait."""
        instead = "DBOSEngine(url, keep=1.0)"
        self.keep = math.inf if keep == math.inf else checked_seconds("keep", keep, instead=instead)
        """Seconds for which a job that is over is remembered."""
        self._name = name
        self._store: Store | None = None
        self._waiters: Waiters | None = None
        self._worker: Worker | None = None

    def _check_url(self, url: object) -> None:
        Address(url, connect_timeout=1.0)

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[None, None]:
        store = Store(
            str(self),
            Address(self.url, connect_timeout=self.enqueue_timeout),
            name=self._name,
            version=f"{self._name}/{self.application_version}",  # DBOS lets no two apps share one
        )
        with guarded():
            try:
                await store.open()
                waiters = Waiters(store, self.polling)
                self._store, self._waiters = store, waiters
                try:
                    yield
                finally:
                    await waiters.close()
            finally:
                self._store = self._waiters = None
                await store.close()

    @asynccontextmanager
    async def _working(self, executor: Executor) -> AsyncGenerator[None, None]:
        store, waiters = self._started
        worker = self._worker = Worker(
            store,
            store.address.slots(str(self), self._name),
            executor,
            concurrency=self.concurrency,
            polling=self.polling,
            max_recoveries=self.max_recoveries,
            on_over=waiters.hurry,
        )
        await worker.start()
        keeping = asyncio.create_task(self._keep_house(store, worker))
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            await worker.stop()
            self._worker = None

    def _pause(self) -> None:
        assert self._worker is not None
        self._worker.runs.pause()

    async def _keep_house(self, store: Store, worker: Worker) -> None:
        """Forget what is old, and look after the jobs of processes that have died."""
        next_purge = monotonic()
        is_lost = False
        while True:
            try:
                await worker.look_after_others()
                if monotonic() >= next_purge:
                    await store.purge(self.keep)
                    next_purge = monotonic() + min(self.keep, _PURGE)
                is_lost = False
            except EngineUnavailableError as error:
                if not is_lost:
                    logger.warning("%s", error)
                is_lost = True
            except Exception:
                logger.exception("%s cannot look after its database", self)
            await asyncio.sleep(_LOOK)

    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        store, _ = self._started
        return await store.enqueue(job_id, message, options.delay)

    async def _record(self, job_id: str) -> JobRecord | None:
        store, _ = self._started
        row = await store.row(job_id)
        return None if row is None else record_of(row)

    async def _until_over(self, job_id: str) -> JobRecord | None:
        _, waiters = self._started
        row = await waiters.wait(job_id)
        return None if row is None else record_of(row)

    async def _cancel(self, job_id: str) -> bool:
        store, _ = self._started
        row = await store.row(job_id)
        if row is None or is_over(row):
            return False
        # First the row: else the job could be handed out again meanwhile.
        await store.cancel(row)
        if self.executor is not None:
            self.executor.cancel(job_id)
        row = await store.row(job_id)
        return row is not None and row.status == "CANCELLED"

    @property
    def _started(self) -> tuple[Store, Waiters]:
        assert self._store is not None
        assert self._waiters is not None
        return self._store, self._waiters


def _check_name(name: object) -> None:
    if not isinstance(name, str) or re.fullmatch("[a-z0-9_-]{3,100}", name) is None:
        raise InvalidSettingError(
            "name",
            name,
            expected="3 to 100 lower-case letters, digits, - and _",
            instead='DBOSEngine(url, name="shop")',
        )


def _check_version(version: object) -> None:
    if not isinstance(version, str) or not version:
        raise InvalidSettingError(
            "application_version",
            version,
            expected="a string that is not empty",
            instead='DBOSEngine(url, application_version="1")',
        )

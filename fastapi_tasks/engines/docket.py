"""Jobs in Redis or Valkey, for workers on any number of hosts: docket, by its package pydocket."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi_tasks.config import Duration
from fastapi_tasks.errors import EngineUnavailableError, InvalidSettingError
from fastapi_tasks.extras import extra

from .base import EngineAdapter, JobOptions, JobRecord, Lifespan
from .execution import Executor
from .messages import Message
from .settings import check_count, checked_seconds

with extra("docket", __name__, docket="pydocket", redis="pydocket"):
    from .docket_records import CANCELLING, Waiters, record_of
    from .docket_wire import JSONDocket, RedisError, key_of, parse_url
    from .docket_worker import DocketWorker

__all__ = ["DocketEngine"]

_SCHEMES = ("redis", "rediss", "unix")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_CALLS = 40
"""How many connections are there for what this process asks of Redis, beside its worker's."""
_OWN = 10
"""How many docket itself needs, and listening for news of jobs. A job has two at most."""
_LATEST = datetime(9999, 1, 1, tzinfo=UTC)
_UNAVAILABLE = "Look whether Redis runs there, and lets you in"


class DocketEngine(EngineAdapter):
    """Keeps jobs in Redis or Valkey, and runs them in workers on any number of hosts.

    They are as durable as the server is: turn on its append-only file. A key is free again as soon
    as its job is over.

    :param url: where the server is: ``redis://``, ``rediss://`` or ``unix://``
    :param name: what all keys in Redis begin with, the same in every process; engines with
        different names are apart
    :param redelivery_timeout: seconds or ``timedelta`` after which a job is taken over whose
        worker was not heard of; 30 seconds by default
    :param max_deliveries: how many workers an attempt is given to that do not survive it, before
        the job has failed with a ``WorkerLostError``, of which ``on_error`` is told; 3 by default
    :param keep: seconds or ``timedelta`` for which results and records of jobs that are over are
        kept; an hour by default
    :param worker: whether this process runs jobs too, and not only enqueues them
    :param concurrency: how many jobs run at once in a process that does; 10 by default
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
        redelivery_timeout: Duration = 30.0,
        max_deliveries: int = 3,
        keep: Duration = 3600.0,
        worker: bool = False,
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
        check_count("max_deliveries", max_deliveries, instead="max_deliveries=3")
        self.name = name
        """What all keys in Redis begin with."""
        self.redelivery_timeout = checked_seconds(
            "redelivery_timeout", redelivery_timeout, least=1, instead="redelivery_timeout=30"
        )
        """Seconds after which a job is taken over whose worker was not heard of."""
        self.max_deliveries = max_deliveries
        """How many workers an attempt is given to that do not survive it."""
        self.keep = checked_seconds("keep", keep, least=1, instead="keep=3600")
        """Seconds for which results and records of jobs that are over are kept."""
        self._docket: JSONDocket | None = None
        self._waiters: Waiters | None = None
        self._calls = asyncio.Semaphore()
        self._docket_worker: DocketWorker | None = None

    def _check_url(self, url: object) -> None:
        if not isinstance(url, str) or not _is_address(url):
            raise InvalidSettingError(
                "url",
                # It may have a password in it.
                f"{urlsplit(url).scheme}://..." if isinstance(url, str) else url,
                expected="the address of a Redis server",
                instead='DocketEngine("redis://localhost:6379/0")',
            )

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[None, None]:
        _quieten()
        place, options = self._address()
        docket = JSONDocket(
            self.name,
            f"{place}?{urlencode(options)}",
            keep=self.keep,
            max_deliveries=self.max_deliveries,
        )
        async with docket:
            self._docket = docket
            spare = int(options["max_connections"]) - 2 * self.concurrency - _OWN
            self._calls = asyncio.Semaphore(min(max(spare, 1), _CALLS))
            self._waiters = Waiters(docket)
            async with self._within(), self._asking() as asked, asked.redis() as redis:
                await redis.ping()
            async with self._waiters.listening():
                yield

    def _address(self) -> tuple[str, dict[str, str]]:
        """Return where the server is, and how to be connected with it."""
        place, _, query = self.url.partition("?")
        options = {
            "max_connections": str(2 * self.concurrency + _CALLS + _OWN),
            # One more try: a connection that lay there may be gone, and nobody knew.
            "retry_on_timeout": "yes",
            "socket_timeout": "5",
            "socket_connect_timeout": "3",
        }
        return place, options | dict(parse_qsl(query))

    def _working(self, executor: Executor) -> AbstractAsyncContextManager[None]:
        assert self._docket is not None
        self._docket_worker = DocketWorker(
            self._docket,
            executor,
            concurrency=self.concurrency,
            redelivery_timeout=self.redelivery_timeout,
            patience=self.enqueue_timeout,
        )
        return self._docket_worker.working()

    def _pause(self) -> None:
        assert self._docket_worker is not None
        self._docket_worker.pause()

    @asynccontextmanager
    async def _asking(self) -> AsyncGenerator[JSONDocket, None]:
        """Ask something of Redis, when a connection is free.

        :raises EngineUnavailableError: it cannot be asked
        """
        assert self._docket is not None
        try:
            async with self._calls:
                yield self._docket
        except RedisError as error:
            raise EngineUnavailableError(
                str(self), f"{type(error).__name__}: {error}".rstrip("."), instead=_UNAVAILABLE
            ) from error

    async def _enqueue(self, job_id: str, message: Message, options: JobOptions) -> str:
        when = _LATEST
        if message.due < _LATEST.timestamp():
            when = datetime.fromtimestamp(message.due, UTC)
        async with self._asking() as docket:
            text = message.model_dump_json()
            await docket.schedule(docket.execution(key_of(job_id), text, when=when))
        return job_id

    async def _record(self, job_id: str) -> JobRecord | None:
        async with self._asking() as docket, docket.redis() as redis:
            fields = await redis.hgetall(docket.runs_key(key_of(job_id)))
        return record_of(job_id, fields)

    async def _until_over(self, job_id: str) -> JobRecord | None:
        async def look() -> JobRecord | None:
            async with self._within():
                return await self._record(job_id)

        assert self._waiters is not None
        return await self._waiters.until_over(job_id, look)

    async def _cancel(self, job_id: str) -> bool:
        key = key_of(job_id)
        async with self._asking() as docket, docket.redis() as redis:
            runs_key = docket.runs_key(key)
            state = await redis.hget(runs_key, "state")
            if state in (b"scheduled", b"queued"):
                await docket.cancel(key)
                return True
            if state != b"running":
                return False
            # docket itself would say at once that it was cancelled, while it still runs. It is
            # asked to tell the worker; the mark is for the next one, if that is lost.
            await redis.hset(runs_key, CANCELLING, "1")
            await redis.publish(docket.cancel_channel(key), key)
            return True


def _quieten() -> None:
    """Keep docket from telling of each job, and of a Redis that is gone, what our log says."""
    for name in ("docket.worker", "docket._redelivery"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return record.levelno >= logging.ERROR and not isinstance(error, RedisError)


def _is_address(url: str) -> bool:
    try:
        return urlsplit(url).scheme in _SCHEMES and bool(parse_url(url))
    except ValueError:  # an option cannot have that value
        return False


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidSettingError(
            "name",
            name,
            expected="1 to 100 letters, digits, dots, dashes and underscores",
            instead='DocketEngine("redis://localhost:6379/0", name="parcels")',
        )

"""What docket's records in Redis say of a job, and waiting until it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from fastapi_tasks.errors import EngineStateError, EngineUnavailableError, MalformedMessageError
from fastapi_tasks.info import Progress, TaskInfo, TaskStatus
from fastapi_tasks.observer import logger

from .base import JobRecord
from .docket_screen import wait_at_most
from .docket_wire import OVER, JSONDocket, RedisError, key_of
from .messages import read_message

__all__ = ["ATTEMPT", "BEGUN", "CANCELLING", "PROGRESS", "Waiters", "record_of"]

# What is added to docket's own fields.
ATTEMPT = "attempt"
"""How often it was begun."""
BEGUN = "begun"
"""When it was begun first."""
CANCELLING = "cancelling"
"""Whether somebody has asked for it to be cancelled."""
PROGRESS = "progress"
"""How far it has come, as JSON."""

_STATUSES = {
    "scheduled": TaskStatus.PENDING,
    "queued": TaskStatus.PENDING,
    "running": TaskStatus.RUNNING,
    "completed": TaskStatus.SUCCEEDED,
    "failed": TaskStatus.FAILED,
    "cancelled": TaskStatus.CANCELLED,
}
_FINAL = frozenset((TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED))
_ENDS = tuple(f'"{state.value}"'.encode() for state in OVER)
"""One of which is in the news that a job, or one attempt of it, is over."""

_LOOK_EVERY = 5.0
"""Seconds after which a waiter looks by itself: Redis keeps no news for those who miss it."""
_RETRY = 0.5
"""Seconds between two tries to listen when Redis cannot be reached."""


def record_of(job_id: str, fields: Mapping[bytes, bytes]) -> JobRecord | None:
    """Return what there is to tell of a job.

    :param fields: those of docket's record, none if there is none
    """
    texts = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
    status = _STATUSES.get(texts.get("state", ""))
    if status is None:
        return None
    name, created = _origin_of(texts)
    kind, _, error = texts.get("error", "").partition(": ")
    progress = texts.get(PROGRESS)
    info = TaskInfo(
        id=job_id,
        name=name,
        status=status,
        attempt=int(texts.get(ATTEMPT, 0)),
        progress=None if progress is None else Progress.model_validate_json(progress),
        created=created,
        started=_moment(texts.get(BEGUN)),
        finished=_moment(texts.get("completed_at")) if status in _FINAL else None,
        error_type=kind or None,
        error=error if kind else None,
    )
    return JobRecord(info, texts.get("result_key") if status is TaskStatus.SUCCEEDED else None)


def _origin_of(texts: Mapping[str, str]) -> tuple[str, datetime]:
    try:
        message = read_message(texts.get("args", ""))
    except MalformedMessageError:
        return "(unreadable)", datetime.fromtimestamp(float(texts.get("when", 0)), UTC)
    return message.name, datetime.fromtimestamp(message.created, UTC)


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


class Waiters:
    """Those in this process who wait for jobs: all of them by one connection to Redis.

    :param docket: the docket
    """

    def __init__(self, docket: JSONDocket) -> None:
        self._docket = docket
        self._news: dict[str, set[asyncio.Event]] = {}
        self._prefix = docket.key("state:")
        self._listening: asyncio.Task[None] | None = None
        self._is_open = False

    async def until_over(
        self, job_id: str, look: Callable[[], Awaitable[JobRecord | None]]
    ) -> JobRecord | None:
        """Wait until a job is over, through outages too.

        :param look: returns what is known of it
        :raises EngineUnavailableError: there is an outage to begin with
        :raises EngineStateError: the engine is stopped meanwhile
        """
        news = asyncio.Event()
        key = key_of(job_id)
        self._news.setdefault(key, set()).add(news)
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen())
        try:
            record = await look()
            while record is not None and record.info.status not in _FINAL:
                await wait_at_most(_LOOK_EVERY, news)
                news.clear()
                if not self._is_open:
                    raise EngineStateError(
                        f"The engine was stopped while job {job_id} was waited for",
                        instead="await engine.find(job_id)  # when it runs again",
                    )
                with suppress(EngineUnavailableError):
                    record = await look()
            return record
        finally:
            self._news[key].discard(news)
            if not self._news[key]:
                del self._news[key]

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[None, None]:
        """Stop listening on exit, and have nobody wait any more."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            self._wake_all()
            if self._listening is not None:
                self._listening.cancel()
                await asyncio.wait([self._listening])

    async def _listen(self) -> None:
        while self._news:
            try:
                async with self._docket.redis() as redis, redis.pubsub() as pubsub:
                    await pubsub.psubscribe(f"{self._prefix}*")
                    async with aclosing(pubsub.listen()) as messages:
                        while self._news:
                            self._tell(await anext(messages))
            except RedisError as error:
                logger.debug("Redis tells no news of jobs: %s", error)
                await asyncio.sleep(_RETRY)

    def _tell(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "pmessage":
            if not any(end in message["data"] for end in _ENDS):
                return
            key = message["channel"].decode().removeprefix(self._prefix)
            for event in self._news.get(key, ()):
                event.set()
        else:  # what happened before it listened, it was not told
            self._wake_all()

    def _wake_all(self) -> None:
        for events in self._news.values():
            for event in events:
                event.set()

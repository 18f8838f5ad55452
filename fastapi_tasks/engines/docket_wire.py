"""What goes through Redis to docket's workers and back: JSON, and nothing that anybody unpickles.

docket itself writes pickles, and loads those that it finds: arguments in a worker, strikes in every
process that enqueues, results and errors where they are asked for. Whoever can write to Redis could
run code in all of them. So the arguments are written as JSON here, what workers read is looked
through before docket sees it, there are no strikes, and docket is never asked for a result.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeAlias

from docket import Docket, Execution, ExecutionState, StrikeList
from docket.dependencies import (
    CompletionHandler,
    FailureHandler,
    TaskOutcome,
    current_docket,
    current_execution,
)
from redis.asyncio.connection import parse_url
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fastapi_tasks.errors import MalformedMessageError, WorkerLostError
from fastapi_tasks.observer import logger

from .docket_screen import FUNCTION, PREFIX, Parcel, ScreenedRedis

__all__ = [
    "LOST",
    "OVER",
    "JSONDocket",
    "JSONExecution",
    "RedisError",
    "RedisTimeoutError",
    "job_id_of",
    "key_of",
    "parse_url",
]

RunJob: TypeAlias = Callable[[Execution, str], Awaitable[None]]
"""Runs a job, given its message, and sees to what becomes of it."""

OVER = frozenset((ExecutionState.COMPLETED, ExecutionState.FAILED, ExecutionState.CANCELLED))
"""The states in which a job stays."""

LOST = "lost"
"""In a job's record, how many workers have not survived it, if it is to run no more."""

_REFUSED_AT_MOST = 1000
"""How many refused messages are kept, or a few more."""


def key_of(job_id: str) -> str:
    """Return docket's key of a job."""
    return f"{PREFIX}{job_id}"


def job_id_of(key: str) -> str:
    """Return the id of a job again."""
    return key.removeprefix(PREFIX)


class JSONExecution(Execution):
    """A job that is about to be written to Redis."""

    def as_message(self) -> dict[bytes, bytes]:
        """Return its fields, with JSON in place of the pickles."""
        (text,) = self.args
        return {
            b"key": self.key.encode(),
            b"when": self.when.isoformat().encode(),
            b"function": self.function_name.encode(),
            b"args": text.encode(),
            b"kwargs": b"{}",
            b"attempt": str(self.attempt).encode(),
            b"generation": str(self.generation).encode(),
        }


class Settled(FailureHandler[Any], CompletionHandler[Any]):
    """Tells docket's worker that the job's end was seen to."""

    async def __aenter__(self) -> Self:
        return self

    async def on_complete(self, execution: Execution, outcome: TaskOutcome) -> bool:
        """Have docket do nothing more."""
        return True

    async def handle_failure(self, execution: Execution, outcome: TaskOutcome) -> bool:
        """Have docket pickle no error. One that comes here is not the job's: that was seen to."""
        error = outcome.exception
        if isinstance(error, RedisError):
            raise error  # the message stays where it is, and docket connects anew
        logger.error("Job %s could not be run", job_id_of(execution.key), exc_info=error)
        await execution.mark_as_failed(f"{type(error).__name__}: {error}")
        return True


_SETTLED = Settled()


async def _run(text: str, settled: Settled = _SETTLED) -> None:
    """Be what docket's workers call: its signature tells them to leave the end to us."""
    docket = current_docket.get()
    assert isinstance(docket, JSONDocket)
    assert docket.run_job is not None
    await docket.run_job(current_execution.get(), text)


class JSONDocket(Docket):
    """A docket of jobs whose arguments are JSON.

    :param name: the prefix of its keys in Redis
    :param url: where Redis is
    :param keep: seconds for which Redis keeps what has become of a job
    :param max_deliveries: how often a message is handed to a worker that runs the job; it is
        handed out as often again to have its error handler run
    """

    def __init__(self, name: str, url: str, *, keep: float, max_deliveries: int) -> None:
        super().__init__(name=name, url=url, execution_ttl=timedelta(seconds=keep))
        self.stopping = asyncio.Event()
        """Whether this process's worker is about to stop."""
        self.run_job: RunJob | None = None
        """What runs jobs in this process, if something does."""
        self._max_deliveries = max_deliveries
        self._strikes = StrikeList()
        self.tasks.clear()  # docket's own would do what a message says
        self.register(_run, names=[FUNCTION])

    @property
    def strike_list(self) -> StrikeList:
        """An empty one: docket's own would unpickle what is in Redis."""
        return self._strikes

    @strike_list.setter
    def strike_list(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: StrikeList
    ) -> None:
        """Leave out the one that docket makes."""

    @asynccontextmanager
    async def redis(self) -> AsyncGenerator[Any, None]:
        """Give docket a client that looks through what a worker reads."""
        async with super().redis() as redis:
            yield ScreenedRedis(redis, self)

    def execution(
        self,
        key: str,
        text: str = "",
        *,
        when: datetime | None = None,
        attempt: int = 1,
        generation: int = 0,
        message_id: bytes | None = None,
    ) -> JSONExecution:
        """Return a job as docket has them: to be written, or to be marked as over."""
        return JSONExecution(
            self,
            self.tasks[FUNCTION],
            (text,),
            {},
            key,
            datetime.now(UTC) if when is None else when,
            attempt,
            function_name=FUNCTION,
            generation=generation,
            message_id=message_id,
        )

    async def set_aside(self, fields: Mapping[bytes, bytes | str], reason: str) -> None:
        """Keep a message that is no job for whoever wants to look at it."""
        async with self.redis() as redis:
            refused = {**fields, b"refused": reason}
            await redis.xadd(self.key("refused"), refused, maxlen=_REFUSED_AT_MOST)

    async def screen(
        self, message_id: bytes, fields: Mapping[bytes, bytes], deliveries: int
    ) -> dict[bytes, bytes] | None:
        """Return what docket may read of a message, ``None`` if it is not to be run.

        :param deliveries: how often it was handed to a worker, this time included
        """
        try:
            parcel = Parcel.read(fields)
        except MalformedMessageError as error:
            logger.error("Message %s was refused: %s", message_id.decode(), error)
            await self.set_aside(fields, str(error))
            await self._fail(message_id, fields, error)
            return None
        lost, limit = deliveries - 1, self._max_deliveries
        if lost >= 2 * limit:
            job_id, end = job_id_of(parcel.key), WorkerLostError(lost)
            logger.error("Job %s has failed, and so did its error handler: %s", job_id, end)
            await self.execution(
                parcel.key, generation=parcel.generation, message_id=message_id
            ).mark_as_failed(f"{type(end).__name__}: {end}")
            return None
        if lost >= limit:
            async with self.redis() as redis:
                await redis.hset(self.runs_key(parcel.key), LOST, lost)
        return parcel.fields(attempt=parcel.attempt + min(lost, limit - 1))

    async def _fail(
        self, message_id: bytes, fields: Mapping[bytes, bytes], error: MalformedMessageError
    ) -> None:
        """Remove a message, and have its job end, if there is one and somebody may wait for it."""
        key = fields.get(b"key", b"").decode(errors="replace")
        async with self.redis() as redis:
            state = await redis.hget(self.runs_key(key), "state")
            if state is None or ExecutionState(state.decode()) in OVER:
                async with redis.pipeline(transaction=True) as pipeline:
                    pipeline.xack(self.stream_key, self.worker_group_name, message_id)
                    pipeline.xdel(self.stream_key, message_id)
                    await pipeline.execute()
                return
        job = self.execution(key, message_id=message_id)
        await job.mark_as_failed(f"{type(error).__name__}: {error}")

"""What goes through Redis to docket's workers and back: JSON, and nothing that anybody unpickles.

docket itself writes pickles, and loads those that it finds: arguments in a worker, strikes in every
process that enqueues, results and errors where they are asked for. Whoever can write to Redis could
run code in all of them. So the arguments are written as JSON here, what workers read is looked
through before docket sees it, there are no strikes, and docket is never asked for a result.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeAlias, cast

from fastapi_tasks.errors import MalformedMessageError, MissingPackageError
from fastapi_tasks.observer import logger

try:
    from docket import Docket, Execution, ExecutionState, StrikeList
    from docket.dependencies import (
        CompletionHandler,
        FailureHandler,
        TaskOutcome,
        current_docket,
        current_execution,
    )
    from redis.exceptions import ConnectionError as RedisConnectionError
    from redis.exceptions import RedisError
    from redis.exceptions import TimeoutError as RedisTimeoutError
except ImportError as error:
    raise MissingPackageError("fastapi_tasks.engines.docket", "pydocket", extra="docket") from error

__all__ = [
    "OVER",
    "JSONDocket",
    "JSONExecution",
    "RedisError",
    "RedisTimeoutError",
    "happens_within",
    "job_id_of",
    "key_of",
]

RunJob: TypeAlias = Callable[[Execution, str], Awaitable[None]]
"""Runs a job, given its message, and sees to what becomes of it."""

OVER = frozenset((ExecutionState.COMPLETED, ExecutionState.FAILED, ExecutionState.CANCELLED))
"""The states in which a job stays."""

_FUNCTION = "fastapi_tasks"
"""The one function that docket knows: the jobs' own names are in their messages."""
_PREFIX = "job:"
"""Begins the keys of jobs, among which docket has some of its own."""
_REFUSED_AT_MOST = 1000
"""How many refused messages are kept, or a few more."""
_BLOCK = 100
"""Milliseconds for which a worker that has nothing to do waits for messages, at a time."""
_RETRY = 0.5
"""Seconds between two tries to read when Redis cannot be reached."""


def key_of(job_id: str) -> str:
    """Return docket's key of a job."""
    return f"{_PREFIX}{job_id}"


def job_id_of(key: str) -> str:
    """Return the id of a job again."""
    return key.removeprefix(_PREFIX)


async def happens_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, and return whether it came in time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


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
    :param max_deliveries: how often a message is handed to a worker
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
        self.register(_run, names=[_FUNCTION])

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
            yield _ScreenedRedis(redis, self)

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
            self.tasks[_FUNCTION],
            (text,),
            {},
            key,
            datetime.now(UTC) if when is None else when,
            attempt,
            function_name=_FUNCTION,
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
            parcel = _Parcel.read(fields)
        except MalformedMessageError as error:
            logger.error("Message %s was refused: %s", message_id.decode(), error)
            await self.set_aside(fields, str(error))
            await self._fail(message_id, fields, error)
            return None
        if deliveries > self._max_deliveries:
            problem = f"no worker has survived it, or kept in touch, in {deliveries - 1} deliveries"
            logger.error("Job %s has failed: %s", job_id_of(parcel.key), problem)
            await self.execution(
                parcel.key, generation=parcel.generation, message_id=message_id
            ).mark_as_failed(f"WorkerLostError: {problem}")
            return None
        return parcel.fields(attempt=parcel.attempt + deliveries - 1)

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


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What there is to a message of ours, once it was found to be one."""

    key: str
    text: str
    when: str
    attempt: int
    generation: int

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> _Parcel:
        """Read a message.

        :raises MalformedMessageError: it is none of ours
        """
        try:
            if fields[b"function"].decode() != _FUNCTION:
                raise MalformedMessageError("it names a function of somebody else's")
            when = fields[b"when"].decode()
            datetime.fromisoformat(when)
            parcel = cls(
                fields[b"key"].decode(),
                fields[b"args"].decode(),
                when,
                int(fields[b"attempt"]),
                int(fields[b"generation"]),
            )
        except KeyError as error:
            raise MalformedMessageError(f"the field {error.args[0].decode()} is missing") from None
        except ValueError as error:
            if isinstance(error, MalformedMessageError):
                raise
            # What it says may quote the message.
            raise MalformedMessageError("a field is not what it has to be") from None
        if not parcel.key.startswith(_PREFIX) or parcel.attempt < 1:
            raise MalformedMessageError("its key or its attempt is none of ours")
        return parcel

    def fields(self, *, attempt: int) -> dict[bytes, bytes]:
        """Return what docket is to read: the pickles in it are made here."""
        return {
            b"key": self.key.encode(),
            b"when": self.when.encode(),
            b"function": _FUNCTION.encode(),
            b"args": pickle.dumps((self.text,)),
            b"kwargs": pickle.dumps({}),
            b"attempt": str(attempt).encode(),
            b"generation": str(self.generation).encode(),
        }


class _ScreenedRedis:
    """A client of Redis's, by which docket's worker reads only what was looked through.

    :param redis: the client
    :param docket: the docket
    """

    def __init__(self, redis: Any, docket: JSONDocket) -> None:
        self._redis = redis
        self._docket = docket

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    async def xreadgroup(self, *args: Any, block: int, **kwargs: Any) -> list[tuple[bytes, Any]]:
        """Read new messages, for which it waits longer than docket between looks at its tasks."""
        streams = await self._read(*args, block=max(block, _BLOCK), **kwargs)
        return [
            (stream, await self._screened(messages, dict.fromkeys((m for m, _ in messages), 1)))
            for stream, messages in streams
        ]

    async def _read(self, *args: Any, **kwargs: Any) -> list[tuple[bytes, Any]]:
        """Read, as soon as Redis can be reached.

        If an error came out of here, docket would take no job until the last one has ended that
        runs, however long that takes.
        """
        is_lost = False
        while not (is_lost and self._docket.stopping.is_set()):
            try:
                streams = await self._redis.xreadgroup(*args, **kwargs)
            except (RedisConnectionError, RedisTimeoutError) as error:
                if not is_lost:
                    logger.warning("Redis cannot be reached, so no jobs are taken: %s", error)
                is_lost = True
                await happens_within(self._docket.stopping, _RETRY)
            else:
                if is_lost:
                    logger.warning("Redis can be reached again")
                return cast("list[tuple[bytes, Any]]", streams)
        return []

    async def xautoclaim(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Take messages over whose worker seems to be lost."""
        docket = self._docket
        cursor, messages, *rest = await self._redis.xautoclaim(*args, **kwargs)
        deliveries: dict[bytes, int] = {}
        for message_id, _ in messages:
            pending = await self._redis.xpending_range(
                docket.stream_key, docket.worker_group_name, min=message_id, max=message_id, count=1
            )
            deliveries |= {each["message_id"]: each["times_delivered"] for each in pending}
        return [cursor, await self._screened(messages, deliveries), *rest]

    async def _screened(
        self, messages: list[tuple[bytes, dict[bytes, bytes]]], deliveries: dict[bytes, int]
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        screened: list[tuple[bytes, dict[bytes, bytes]]] = []
        for message_id, fields in messages:
            # One that is not pending any more has ended meanwhile, and one without fields was
            # removed.
            if fields and message_id in deliveries:
                passed = await self._docket.screen(message_id, fields, deliveries[message_id])
                if passed is not None:
                    screened.append((message_id, passed))
        return screened

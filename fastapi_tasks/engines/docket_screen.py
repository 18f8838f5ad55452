"""What docket's worker reads, looked through before it sees it."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fastapi_tasks.errors import MalformedMessageError
from fastapi_tasks.observer import logger

if TYPE_CHECKING:
    from .docket_wire import JSONDocket

__all__ = ["FUNCTION", "PREFIX", "Parcel", "ScreenedRedis", "wait_at_most"]

T = TypeVar("T")

FUNCTION = "fastapi_tasks"
"""The one function that docket knows: the jobs' own names are in their messages."""
PREFIX = "job:"
"""Begins the keys of jobs, among which docket has some of its own."""

_BLOCK = 100
"""Milliseconds for which a worker that has nothing to do waits for messages, at a time."""
_RETRY = 0.5
"""Seconds between two tries when Redis cannot be reached."""


async def wait_at_most(seconds: float, event: asyncio.Event) -> None:
    """Wait until an event comes, or a time has passed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


@dataclass(frozen=True, slots=True)
class Parcel:
    """What there is to a message of ours, once it was found to be one."""

    key: str
    text: str
    when: str
    attempt: int
    generation: int

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> Parcel:
        """Read a message.

        :raises MalformedMessageError: it is none of ours
        """
        try:
            function = fields[b"function"].decode()
            parcel = cls(
                fields[b"key"].decode(),
                fields[b"args"].decode(),
                fields[b"when"].decode(),
                int(fields[b"attempt"]),
                int(fields[b"generation"]),
            )
            datetime.fromisoformat(parcel.when)
        except KeyError as error:
            raise MalformedMessageError(f"the field {error.args[0].decode()} is missing") from None
        except ValueError:  # whose text may quote the message
            raise MalformedMessageError("a field is not what it has to be") from None
        if function != FUNCTION:
            raise MalformedMessageError("it names a function of somebody else's")
        if not parcel.key.startswith(PREFIX) or parcel.attempt < 1:
            raise MalformedMessageError("its key or its attempt is none of ours")
        return parcel

    def fields(self, *, attempt: int) -> dict[bytes, bytes]:
        """Return what docket is to read: the pickles in it are made here."""
        return {
            b"key": self.key.encode(),
            b"when": self.when.encode(),
            b"function": FUNCTION.encode(),
            b"args": pickle.dumps((self.text,)),
            b"kwargs": pickle.dumps({}),
            b"attempt": str(attempt).encode(),
            b"generation": str(self.generation).encode(),
        }


class ScreenedRedis:
    """A client of Redis's, by which docket's worker reads only what was looked through.

    What its loop asks for waits until Redis can be reached. If an error came out of here, docket
    would take no job until the last one has ended that runs, however long that takes.

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

        async def read() -> list[tuple[bytes, Any]]:
            streams = await self._redis.xreadgroup(*args, block=max(block, _BLOCK), **kwargs)
            return [(stream, [(*each, 1) for each in messages]) for stream, messages in streams]

        nothing: list[tuple[bytes, Any]] = []
        streams = await self._patiently(read, nothing)
        return [(stream, await self._screened(messages)) for stream, messages in streams]

    async def xautoclaim(self, *args: Any, start_id: Any, **kwargs: Any) -> list[Any]:
        """Take messages over whose worker seems to be lost."""
        docket = self._docket

        async def read() -> tuple[Any, list[Any]]:
            answer = await self._redis.xautoclaim(*args, start_id=start_id, **kwargs)
            messages: list[Any] = []
            for message_id, fields in answer[1]:
                pending = await self._redis.xpending_range(
                    docket.stream_key,
                    docket.worker_group_name,
                    min=message_id,
                    max=message_id,
                    count=1,
                )
                # One that is not pending any more has ended meanwhile.
                messages += [(message_id, fields, each["times_delivered"]) for each in pending]
            return answer[0], messages

        nothing: tuple[Any, list[Any]] = (start_id, [])
        cursor, messages = await self._patiently(read, nothing)
        return [cursor, await self._screened(messages)]

    async def set(self, *args: Any, **kwargs: Any) -> Any:
        """Take the lease of looking for lost workers."""
        return await self._patiently(lambda: self._redis.set(*args, **kwargs), None)

    async def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Run a script."""
        if keys_and_args[0] != self._docket.redelivery_sweep_key:
            return await self._redis.evalsha(sha, numkeys, *keys_and_args)
        return await self._patiently(lambda: self._redis.evalsha(sha, numkeys, *keys_and_args), 0)

    async def _patiently(self, ask: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """Ask for something as soon as Redis can be reached, unless the worker stops before."""
        is_lost = False
        while not (is_lost and self._docket.stopping.is_set()):
            try:
                answer = await ask()
            except (RedisConnectionError, RedisTimeoutError) as error:
                if not is_lost:
                    logger.warning("Redis cannot be reached, so no jobs are taken: %s", error)
                is_lost = True
                await wait_at_most(_RETRY, self._docket.stopping)
            else:
                if is_lost:
                    logger.warning("Redis can be reached again")
                return answer
        return otherwise

    async def _screened(
        self, messages: list[tuple[bytes, dict[bytes, bytes], int]]
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        screened: list[tuple[bytes, dict[bytes, bytes]]] = []
        for message_id, fields, deliveries in messages:
            if fields:  # else it was removed meanwhile
                passed = await self._docket.screen(message_id, fields, deliveries)
                if passed is not None:
                    screened.append((message_id, passed))
        return screened

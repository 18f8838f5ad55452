"""What becomes of the jobs that a docket's worker has taken: each attempt, and storing its end."""

from __future__ import annotations

import asyncio
import functools
from datetime import UTC, datetime, timedelta

from docket import Execution, ExecutionState

from fastapi_tasks.info import Progress
from fastapi_tasks.observer import logger

from .docket_records import ATTEMPT, BEGUN, CANCELLING, PROGRESS
from .docket_wire import LOST, JSONDocket, RedisError, RedisTimeoutError, job_id_of
from .execution import Again, Cancelled, Executor, Failed, Interrupted, Outcome, Succeeded

__all__ = ["Attempts"]

_STORE_AGAIN_AFTER = 0.5
"""Seconds between two tries to store what has become of a job."""


class Attempts:
    """The attempts that run in this process.

    :param docket: the docket
    :param executor: makes them
    :param store_within: seconds in which their ends have to be stored, else they are made again
    :param patience: seconds that each try to store one may take
    """

    def __init__(
        self, docket: JSONDocket, executor: Executor, *, store_within: float, patience: float
    ) -> None:
        self._docket = docket
        self._executor = executor
        self._store_within = store_within
        self._patience = patience
        self._work: dict[bytes, asyncio.Task[None]] = {}

    @property
    def message_ids(self) -> list[bytes]:
        """The messages of the jobs that run."""
        return list(self._work)

    def give_up(self) -> None:
        """Store no more, since Redis does not answer: the messages stay for other workers."""
        for work in self._work.values():
            work.cancel()

    async def run(self, execution: Execution, text: str) -> None:
        """Make one attempt, and store what has come of it.

        :param execution: the job, as docket has it
        :param text: its message
        :raises RedisError: it could not be stored, and docket has to connect anew
        """
        is_cancelled, lost = await self._begin(execution)
        task, message_id = asyncio.current_task(), execution.message_id
        assert task is not None
        assert message_id is not None
        task.add_done_callback(_retrieve_error)
        attempt = self._attempt(execution, text, lost, is_cancelled=is_cancelled)
        work = asyncio.create_task(attempt)
        self._work[message_id] = work
        try:
            while not work.done():
                try:
                    await asyncio.wait([work])
                except asyncio.CancelledError:
                    if self._docket.stopping.is_set():
                        raise
                    self._executor.cancel(job_id_of(execution.key))
        finally:
            work.cancel()
            self._work.pop(message_id, None)
        if work.cancelled():
            # Its message stays where it is, for another worker.
            raise RedisTimeoutError("Redis was not there when the worker had to end")
        work.result()

    async def _begin(self, execution: Execution) -> tuple[bool, int]:
        """Note that an attempt begins.

        :return: whether it is not to, as somebody has cancelled; and how many workers have not
            survived the job, if that is what it is to fail of
        """
        key = self._docket.runs_key(execution.key)
        async with self._docket.redis() as redis, redis.pipeline(transaction=True) as pipeline:
            pipeline.hexists(key, CANCELLING)
            pipeline.hget(key, LOST)
            pipeline.hset(key, ATTEMPT, execution.attempt)
            pipeline.hsetnx(key, BEGUN, datetime.now(UTC).isoformat())
            pipeline.hdel(key, PROGRESS)
            is_cancelled, lost, *_ = await pipeline.execute()
        return bool(is_cancelled), int(lost or 0)

    async def _attempt(
        self, execution: Execution, text: str, lost: int, *, is_cancelled: bool
    ) -> None:
        outcome: Outcome
        if is_cancelled:
            outcome = Cancelled()
        elif self._docket.stopping.is_set():
            outcome = Interrupted()  # it was read in the moment in which the worker was to stop
        else:
            outcome = await self._executor.run(
                job_id_of(execution.key),
                text,
                attempt=execution.attempt,
                store_progress=functools.partial(self._store_progress, execution),
                lost=lost,
            )
        await self._store_in_time(execution, text, outcome)

    async def _store_progress(self, execution: Execution, progress: Progress) -> None:
        async with self._docket.redis() as redis:
            key = self._docket.runs_key(execution.key)
            await redis.hset(key, PROGRESS, progress.model_dump_json())

    async def _store_in_time(self, execution: Execution, text: str, outcome: Outcome) -> None:
        """Store what has come of an attempt, if need be when Redis is back.

        :raises RedisError: it was not back before others take the job over
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._store_within
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    await self._store(execution, text, outcome)
                return
            except (RedisError, TimeoutError) as error:
                if loop.time() >= deadline:
                    raise RedisTimeoutError("Redis was not there in time") from error
                logger.warning(
                    "The end of job %s cannot be stored yet: %s", job_id_of(execution.key), error
                )
                await asyncio.sleep(_STORE_AGAIN_AFTER)

    async def _store(self, execution: Execution, text: str, outcome: Outcome) -> None:
        match outcome:
            case Succeeded(result):
                # As the key of a result the result itself: both are there at once, and as long.
                await execution.mark_as_completed(result_key=result)
            case Failed(error_type, error, refused):
                if refused:
                    fields: dict[bytes, bytes | str] = {
                        b"key": execution.key,
                        b"args": text,
                        b"attempt": str(execution.attempt),
                    }
                    await self._docket.set_aside(fields, f"{error_type}: {error}")
                await execution.mark_as_failed(f"{error_type}: {error}")
            case Cancelled():
                await execution.mark_as_cancelled()
            case Again(wait):
                await self._put_back(execution, text, execution.attempt + 1, wait)
            case _:  # interrupted
                await self._put_back(execution, text, execution.attempt, 0.0)

    async def _put_back(self, execution: Execution, text: str, attempt: int, wait: float) -> None:
        """Have a job run again: its message is replaced in one step."""
        if await self._is_cancelled(execution):
            await execution.mark_as_cancelled()
            return
        again = self._docket.execution(
            execution.key,
            text,
            when=datetime.now(UTC) + timedelta(seconds=wait),
            attempt=attempt,
            generation=execution.generation,
        )
        await again.schedule(
            replace=True,
            reschedule_message=execution.message_id,
            expected_generation=execution.generation,
        )

    async def _is_cancelled(self, execution: Execution) -> bool:
        key = self._docket.runs_key(execution.key)
        async with self._docket.redis() as redis:
            state, asked = await redis.hmget(key, "state", CANCELLING)
        return asked is not None or state == ExecutionState.CANCELLED.value.encode()


def _retrieve_error(task: asyncio.Task[None]) -> None:
    """Have asyncio not complain of an error that docket does not ask for, if it was cancelled."""
    if not task.cancelled():
        task.exception()

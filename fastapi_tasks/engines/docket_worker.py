"""The worker of a docket engine: takes jobs from Redis, and stores what becomes of them."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from docket import Execution, ExecutionState, Worker

from fastapi_tasks.info import Progress
from fastapi_tasks.observer import logger

from .docket_records import ATTEMPT, BEGUN, CANCELLING, PROGRESS
from .docket_screen import wait_at_most
from .docket_wire import JSONDocket, RedisError, RedisTimeoutError, job_id_of
from .execution import Again, Cancelled, Executor, Failed, Interrupted, Outcome, Succeeded

__all__ = ["DocketWorker"]

_CHECK_EVERY = timedelta(milliseconds=10)
"""How often a worker that is busy looks whether it has room: jobs per second and slot are few."""
_SCHEDULE_EVERY = timedelta(milliseconds=100)
"""How late a job begins at most that was to wait."""
_RECONNECT_AFTER = timedelta(seconds=1)
_RESTART_AFTER = 1.0
"""Seconds before a worker that has ended begins again; twice as many each time."""
_RESTART_WITHIN = 30.0
_CANCEL_AFTER = 0.5
"""Seconds before docket's worker is cancelled, once more too: it asks Redis for more as it ends."""
_STORE_AGAIN_AFTER = 0.5
"""Seconds between two tries to store what has become of a job."""
_FORGOTTEN_AFTER = timedelta(hours=1) / timedelta(milliseconds=1)
"""Milliseconds after which somebody is forgotten who has not asked for messages."""


class DocketWorker:
    """Gives a docket's jobs to an executor.

    :param docket: the docket
    :param executor: runs the jobs
    :param concurrency: how many at once
    :param redelivery_timeout: seconds after which others take over a job whose worker is lost
    :param patience: seconds that storing something may take
    """

    def __init__(
        self,
        docket: JSONDocket,
        executor: Executor,
        *,
        concurrency: int,
        redelivery_timeout: float,
        patience: float,
    ) -> None:
        self._docket = docket
        self._executor = executor
        self._concurrency = concurrency
        self._redelivery_timeout = redelivery_timeout
        self._patience = patience
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._jobs: dict[bytes, asyncio.Task[None]] = {}
        self._running: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[None, None]:
        """Take jobs, from entry until :meth:`pause`; what runs at the exit is left to others."""
        self._docket.run_job = self._run_job
        serving = asyncio.create_task(self._serve())
        renewing = asyncio.create_task(self._renew_leases())
        try:
            yield
        finally:
            self.pause()
            await self._end(serving)
            renewing.cancel()
            await asyncio.wait([renewing])

    async def _end(self, serving: asyncio.Task[None]) -> None:
        """Wait until all was stored, but not for ever."""
        done, _ = await asyncio.wait([serving], timeout=self._patience)
        if not done:
            logger.warning("What has become of %d jobs cannot be stored", len(self._jobs))
            for work in self._jobs.values():
                work.cancel()
            done, _ = await asyncio.wait([serving], timeout=_CANCEL_AFTER)
        while not done:
            running = self._running
            (serving if running is None or running.done() else running).cancel()
            done, _ = await asyncio.wait([serving], timeout=_CANCEL_AFTER)

    def pause(self) -> None:
        """Take no more jobs."""
        self._docket.stopping.set()

    async def _serve(self) -> None:
        stopping = self._docket.stopping
        wait = _RESTART_AFTER
        await self._forget_consumers()
        while not stopping.is_set():
            try:
                await self._take_jobs()
            except Exception:
                logger.exception("The worker has failed, and begins again in %g s", wait)
                this_time, wait = wait, min(2 * wait, _RESTART_WITHIN)
                await wait_at_most(this_time, stopping)
        await self._forget_consumers()

    async def _take_jobs(self) -> None:
        # It keeps context variables, so one task has to enter and leave it. Leaving it is what
        # lets it end without a cancellation, in which it could lose messages.
        worker = Worker(
            self._docket,
            name=self._name,
            concurrency=self._concurrency,
            redelivery_timeout=timedelta(seconds=self._redelivery_timeout),
            reconnection_delay=_RECONNECT_AFTER,
            minimum_check_interval=_CHECK_EVERY,
            scheduling_resolution=_SCHEDULE_EVERY,
            schedule_automatic_tasks=False,
        )
        stopped = asyncio.create_task(self._docket.stopping.wait())
        try:
            async with worker:
                self._running = asyncio.create_task(worker.run_forever())
                await asyncio.wait([self._running, stopped], return_when=asyncio.FIRST_COMPLETED)
            await self._running
        finally:
            stopped.cancel()
        if not self._docket.stopping.is_set():
            raise RuntimeError("docket's worker has returned")

    async def _run_job(self, execution: Execution, text: str) -> None:
        """Make one attempt, and store what has come of it."""
        is_cancelled = await self._begin(execution)
        task, message_id = asyncio.current_task(), execution.message_id
        assert task is not None
        assert message_id is not None
        task.add_done_callback(_retrieve_error)
        work = asyncio.create_task(self._attempt(execution, text, is_cancelled=is_cancelled))
        self._jobs[message_id] = work
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
            self._jobs.pop(message_id, None)
        if work.cancelled():
            # Its message stays where it is, for another worker.
            raise RedisTimeoutError("Redis was not there when the worker had to end")
        work.result()

    async def _begin(self, execution: Execution) -> bool:
        """Note that an attempt begins; return whether it is not to, as somebody has cancelled."""
        key = self._docket.runs_key(execution.key)
        async with self._docket.redis() as redis, redis.pipeline(transaction=True) as pipeline:
            pipeline.hexists(key, CANCELLING)
            pipeline.hset(key, ATTEMPT, execution.attempt)
            pipeline.hsetnx(key, BEGUN, datetime.now(UTC).isoformat())
            pipeline.hdel(key, PROGRESS)
            is_cancelled, *_ = await pipeline.execute()
        return bool(is_cancelled)

    async def _attempt(self, execution: Execution, text: str, *, is_cancelled: bool) -> None:
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
        deadline = loop.time() + self._redelivery_timeout
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

    async def _renew_leases(self) -> None:
        """Keep others from taking over what runs here.

        docket's worker does so too, but neither while it stops nor when it has lost Redis: it
        waits then for what runs.
        """
        while True:
            await asyncio.sleep(self._redelivery_timeout / 4)
            if self._jobs:
                try:
                    async with self._docket.redis() as redis:
                        await redis.xclaim(
                            self._docket.stream_key,
                            self._docket.worker_group_name,
                            self._name,
                            min_idle_time=0,
                            message_ids=list(self._jobs),
                            idle=0,
                            justid=True,
                        )
                except RedisError as error:
                    logger.warning("The leases of jobs could not be renewed: %s", error)

    async def _forget_consumers(self) -> None:
        """Remove from Redis who has read messages and is gone, this worker too when it stops."""
        stream, group = self._docket.stream_key, self._docket.worker_group_name
        try:
            async with asyncio.timeout(self._patience), self._docket.redis() as redis:
                for each in await redis.xinfo_consumers(stream, group):
                    is_gone = each["idle"] > _FORGOTTEN_AFTER or each["name"].decode() == self._name
                    if is_gone and each["pending"] == 0:
                        await redis.xgroup_delconsumer(stream, group, each["name"])
        except (RedisError, TimeoutError) as error:  # there is no stream yet, or no connection
            logger.debug("Consumers could not be forgotten: %s", error)


def _retrieve_error(task: asyncio.Task[None]) -> None:
    """Have asyncio not complain of an error that docket does not ask for, if it was cancelled."""
    if not task.cancelled():
        task.exception()
